"""Prepared folders as the data of sweeps: planned, trained on, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from repa_lab.data.folders import IMAGES, LATENTS
from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.plan import make_plan
from repa_lab.orchestration.rehearsal import TinyAssets
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import SpecError, load_spec
from repa_lab.spec.identity import Run
from tests.data.conftest import noise_image
from tests.data.repa_folders import write_repa_folder
from tests.data.test_space import save_vae
from tests.test_cli import cli

SIDE, COUNT = 32, 24


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A VAE, images in class folders, and the same images as REPA's tool would have prepared them."""
    root = tmp_path_factory.mktemp("data")
    vae = save_vae(root / "vae")
    images = [noise_image(i, (SIDE, SIDE)) for i in range(COUNT)]
    labels = [3 * i // COUNT for i in range(COUNT)]
    write_repa_folder(root / "prepared", images, labels, vae)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / "plain" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(root / "plain" / str(label) / f"{number:02d}.png")
    return root


def spec_of(tiny, root: Path, **data) -> dict:
    """A question about data of latents 16x16."""
    given = {
        "source": "repa",
        "path": str(root / "prepared"),
        "resolution": SIDE,
        "vae": str(root / "vae"),
        "holdout": 4,
    }
    spec = tiny(data={**given, **data}, seeds=1)
    spec["regularizer"]["encoder"]["image_size"] = spec["evaluate"]["encoder"]["image_size"] = 64
    return spec


def told(spec: dict, runs: Path) -> list[str]:
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec(spec), RunsRoot(runs))
    return str(caught.value).splitlines()


def test_a_sweep_trains_on_the_latents_as_on_those_it_would_have_encoded(tiny, root, tmp_path):
    spec = spec_of(tiny, root)
    spec["axes"] = {"data": {"prepared": {}, "plain": {"data.source": "imagefolder", "data.path": str(root / "plain")}}}
    spec["compare"] = {"baseline": {"data": "plain"}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    words = ["sweep", str(tmp_path / "spec.yaml"), "--root", str(tmp_path / "runs"), "--workers", "1"]
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert "2 runs trained now, 0 failed" in done.stdout
    runs = {Run.from_json(run.run_id, run.spec).config.data.source: run for run in RunsRoot(tmp_path / "runs").runs()}
    assert {source: run.state.state for source, run in runs.items()} == {"repa": State.DONE, "imagefolder": State.DONE}
    ours, theirs = ([row for row in runs[source].rows() if "loss/total" in row] for source in ("repa", "imagefolder"))
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        # The same images, noise and targets; encoded one at a time and in batches of eight.
        for name in ("loss/denoise", "loss/total"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_the_plan_counts_no_latents(tiny, root, tmp_path):
    specs = [spec_of(tiny, root), spec_of(tiny, root, source="imagefolder", path=str(root / "plain"))]
    found = [estimate(make_plan(load_spec(spec), RunsRoot(tmp_path))) for spec in specs]
    kinds = [[(one.what.split()[0], one.images) for one in estimated.caches] for estimated in found]
    assert kinds == [[("features", COUNT)], [("latents", COUNT), ("features", COUNT)]]


def test_an_incomplete_folder_is_refused_before_anything_is_made(tiny, root, tmp_path):
    path = LATENTS.path(root / "prepared", 5)
    kept = path.read_bytes()
    path.unlink()
    try:
        (line,) = set(told(spec_of(tiny, root), tmp_path / "runs"))
    finally:
        path.write_bytes(kept)
    image = IMAGES.path(root / "prepared", 5)
    assert line.endswith(
        f"data.path: '{image}' has no partner 'vae-sd/00000/img-mean-std-00000005.npy' (1 such); was the preparation interrupted?"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change, expected", [
    ({"vae": None}, "data.vae: not set; name the VAE whose latents the prepared folder has: it decodes the samples"),
    ({"flip": True}, "data: prepared latents are of square images, none of them mirrored: leave flip and buckets out"),
    ({"buckets": {}}, "data: prepared latents are of square images, none of them mirrored: leave flip and buckets out"),
    ({"resolution": 64}, "measures 32x32, not 64x64: set the resolution that the folder was prepared for"),
])  # fmt: skip
def test_settings_that_do_not_fit(tiny, root, tmp_path, change, expected):
    (line,) = set(told(spec_of(tiny, root, **change), tmp_path))
    assert expected in line


def test_captions_are_asked_for_elsewhere(tiny, root, tmp_path):
    spec = spec_of(tiny, root, vae=None)
    spec["model"] = {"family": "sd15", "pretrained": "some/pipeline"}
    spec["regularizer"]["type"] = "urepa"
    message = (
        "data.source: sd15 is trained with captions, and the images of repa have none: use imagefolder, datasets or hub"
    )
    assert any(line.endswith(message) for line in told(spec, tmp_path))


def test_a_rehearsal_takes_a_few_of_the_images(tiny, root, tmp_path):
    data = load_spec(spec_of(tiny, root)).arms[0].config.data
    found = TinyAssets(tmp_path).images(data)
    files = sorted(Path(found["path"]).rglob("*.png"))
    assert found["source"] == "imagefolder"
    assert [file.parent.name for file in files] == [f"{3 * i // COUNT:04d}" for i in range(COUNT)]
    with Image.open(files[7]) as image:
        assert image.tobytes() == noise_image(7, (SIDE, SIDE)).tobytes()
