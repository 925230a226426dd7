from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from repa_lab.cli import app
from repa_lab.cli.models import run_in_processes
from repa_lab.data import DataError
from repa_lab.data.folders import IMAGES, LATENTS, read_listing
from repa_lab.data.latents import latent_space
from repa_lab.data.prepared import Prepared
from repa_lab.data.prepared import prepare as prepare_images
from repa_lab.data.settings import PreparedSettings
from repa_lab.data.sources import ImageFolder
from tests.data.conftest import image_folder, noise_image
from tests.data.test_space import draw, save_vae
from tests.rounding import TINY_VAE, rounding

COUNT, SIDE, BATCH = 50, 32, 4
CPU = torch.device("cpu")
PROCESSES = multiprocessing.get_context("fork")  # of this process, which has torch imported; killing them is real
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images of many sizes in three classes, and a VAE."""
    root = tmp_path_factory.mktemp("prepare")
    save_vae(root / "vae")
    for number in range(COUNT):
        place = root / "source" / ("ant", "bee", "cat")[number % 3] / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number, (30 + 3 * number, 200 - 3 * number)).save(place)
    return root


def prepare(root: Path, folder: Path, **changes) -> int:
    given = {"source": root / "source", "resolution": SIDE, "vae": str(root / "vae"), "batch_size": BATCH}
    return prepare_images(folder=folder, device=CPU, **{**given, **changes})


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """The prepared folder, uninterrupted."""
    assert prepare(root, root / "whole", threads=2) == COUNT
    return root / "whole"


def contents(folder: Path) -> Files:
    """Every file but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def adm(image: Image.Image, side: int) -> np.ndarray:
    """ADM's crop from its description: halve by boxes while twice too large, bicubic to the side, cut the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    width, height = (round(length * (side / min(image.size))) for length in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


class TestWhatIsWritten:
    def test_it_is_the_layout_of_repas_tool(self, whole):
        names = {f"images/00000/img{i:08d}.png" for i in range(COUNT)}
        names |= {f"vae-sd/00000/img-mean-std-{i:08d}.npy" for i in range(COUNT)}
        assert contents(whole).keys() == names | {"images/dataset.json", "vae-sd/dataset.json", "manifest.json"}

    def test_images_are_cropped_as_adm_crops_them_and_not_compressed(self, root, whole):
        files = sorted((root / "source").rglob("*.png"))
        for number, file in enumerate(files):
            path = IMAGES.path(whole, number)
            with Image.open(path) as written, Image.open(file) as original:
                assert written.mode == "RGB"
                assert np.array_equal(np.asarray(written), adm(original, SIDE))
            assert path.stat().st_size > 3 * SIDE * SIDE

    def test_latents_are_mean_and_deviation_of_the_image_in_float32(self, root, whole):
        vae = save_vae(root / "again")
        for number in (0, 17, COUNT - 1):
            values = np.load(LATENTS.path(whole, number))
            assert (values.shape, values.dtype) == ((8, SIDE // 2, SIDE // 2), np.float32)
            x = (
                torch.from_numpy(np.array(Image.open(IMAGES.path(whole, number)))).permute(2, 0, 1)[None].float()
                / 127.5
                - 1
            )
            with torch.no_grad():
                latent = vae.encode(x).latent_dist
            mean, logs = latent.mean[0].numpy(), latent.logvar[0].double().numpy()
            error = rounding(np.concatenate([mean, logs]), TINY_VAE)
            np.testing.assert_allclose(values[:4], mean, rtol=0, atol=error)
            np.testing.assert_allclose(values[4:], np.exp(logs / 2), rtol=error / 2, atol=0)

    def test_labels_number_the_class_folders(self, root, whole):
        rows = json.loads((whole / "images/dataset.json").read_text())["labels"]
        classes = [file.parent.name for file in sorted((root / "source").rglob("*.png"))]
        assert rows == [[f"00000/img{i:08d}.png", ["ant", "bee", "cat"].index(name)] for i, name in enumerate(classes)]
        latents = json.loads((whole / "vae-sd/dataset.json").read_text())["labels"]
        assert latents == [[f"00000/img-mean-std-{i:08d}.npy", label] for i, (_, label) in enumerate(rows)]

    def test_the_manifest_says_how(self, root, whole):
        held = json.loads((whole / "manifest.json").read_text())
        hashes = {key: held.pop(key) for key in ("vae_hash", "source")}
        assert all(len(value) == 64 for value in hashes.values())
        assert held == {
            "vae": str(root / "vae"), "scaling": {"mean": [0.1159], "scale": [0.3611], "patch": [1, 1]},
            "resolution": SIDE, "crop": "center-crop-dhariwal", "count": COUNT,
        }  # fmt: skip

    def test_training_on_it_is_training_on_the_images_themselves(self, root, whole, tmp_path):
        prepared, plain = (
            Prepared(PreparedSettings(path=str(whole), resolution=SIDE)),
            image_folder(root / "source", SIDE),
        )
        assert torch.equal(prepared.read(range(COUNT)), plain.read(range(COUNT)))
        assert torch.equal(prepared.labels, plain.labels) and prepared.num_classes == plain.num_classes
        index = torch.tensor([7, 0, COUNT - 1])
        spaces = [latent_space(source, str(root / "vae"), tmp_path) for source in (prepared, plain)]
        noise = [space.draw(space.read(index), 3, draw(5)) for space in spaces]
        assert torch.equal(*noise)
        ours, theirs = (space.encode(space.read(index), noise[0]) for space in spaces)
        error = rounding(theirs, TINY_VAE)  # encoded in batches of 4 and of 8
        torch.testing.assert_close(ours, theirs, rtol=0, atol=error)


class TestGoingOn:
    def test_what_is_there_is_left_alone_and_what_is_not_is_as_it_was(self, root, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path / "data")
        gone = [IMAGES.path(folder, 2), LATENTS.path(folder, 9), folder / "images/dataset.json"]
        for path in gone:
            path.unlink()
        LATENTS.path(folder, 11).write_bytes(b"")  # as a power cut leaves it
        gone.append(LATENTS.path(folder, 11))
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
        prepare(root, folder)
        assert contents(folder) == contents(whole)
        kept = before.keys() - {*gone, folder / ".lock"}
        assert all(path.stat().st_mtime_ns == before[path] for path in kept) and len(kept) == 2 * COUNT + 2 - 3

    def test_what_is_done_is_not_encoded(self, root, whole, tmp_path, monkeypatch):
        folder = shutil.copytree(whole, tmp_path / "data")
        LATENTS.path(folder, 5).unlink()
        opened = []
        monkeypatch.setattr(
            ImageFolder, "open", lambda self, i, real=ImageFolder.open: opened.append(i) or real(self, i)
        )
        prepare(root, folder)
        assert sorted(opened) == [4, 5, 6, 7]  # the batch

    def test_parts_are_disjoint_and_complete_whoever_begins(self, root, whole, tmp_path):
        counts = [prepare(root, tmp_path / "data", rank=rank, world=3, threads=2) for rank in (2, 0, 1)]
        assert sum(counts) == COUNT and min(counts) > 10
        assert contents(tmp_path / "data") == contents(whole)

    def test_latents_do_not_depend_on_the_cores(self, root, whole, tmp_path):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            prepare(root, tmp_path / "data")
            assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)
        assert contents(tmp_path / "data") == contents(whole)

    def test_progress_is_told(self, root, tmp_path):
        heard = []
        prepare(root, tmp_path / "data", batch_size=20, progress=lambda *now: heard.append(now))
        assert heard[-1] == (COUNT, COUNT) and [done for done, _ in heard] == sorted(done for done, _ in heard)

    def test_a_moved_vae_is_the_same(self, root, whole, tmp_path):
        shutil.copytree(root / "vae", tmp_path / "moved")
        folder = shutil.copytree(whole, tmp_path / "data")
        LATENTS.path(folder, 3).unlink()
        prepare(root, folder, vae=str(tmp_path / "moved"))
        assert contents(folder) == contents(whole)


class TestRefused:
    def refusal(self, root: Path, folder: Path, **changes) -> str:
        before = contents(folder) if folder.is_dir() else None
        with pytest.raises(DataError) as caught:
            prepare(root, folder, **changes)
        assert (contents(folder) if folder.is_dir() else None) == before
        return f"{caught.value.field}: {caught.value}"

    def test_another_vae(self, root, whole, tmp_path):
        save_vae(tmp_path / "vae", seed=1)
        told = self.refusal(root, whole, vae=str(tmp_path / "vae"))
        assert told.startswith(f"path: '{whole}' is another preparation: vae_hash is ") and told.endswith(
            "; name a new folder"
        )

    def test_another_resolution(self, root, whole):
        told = self.refusal(root, whole, resolution=16)
        assert "is another preparation: resolution is 32, not 16; source is " in told

    def test_other_images(self, root, whole, tmp_path):
        shutil.copytree(root / "source", tmp_path / "source")
        noise_image(99).save(tmp_path / "source/ant/99.png")
        told = self.refusal(root, whole, source=tmp_path / "source")
        assert f"another preparation: count is {COUNT}, not {COUNT + 1}; source is " in told

    def test_a_folder_of_something_else(self, root, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / ".tmp" / "0").mkdir(parents=True)  # where a preparation puts what it has half written
        (tmp_path / ".tmp" / "0" / "1-img.png").write_text("another's")
        assert self.refusal(root, tmp_path) == (
            f"path: '{tmp_path}' is not empty, and no preparation was begun there; name a new folder"
        )

    def test_a_folder_within_the_images(self, root):
        source, inside = root / "source", root / "source" / "prepared"
        assert self.refusal(root, inside) == f"path: '{inside}' lies in '{source}'; name a folder elsewhere"

    def test_a_damaged_manifest(self, root, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path / "data")
        (folder / "manifest.json").write_text('{"vae"')
        assert self.refusal(root, folder).startswith(f"path: cannot read '{folder / 'manifest.json'}'")

    def test_a_vae_of_other_channels(self, root, tmp_path):
        save_vae(tmp_path / "grey", in_channels=1)
        told = self.refusal(root, tmp_path / "data", vae=str(tmp_path / "grey"))
        assert told == "vae: the VAE takes 1 channels, the images have 3"

    def test_an_image_that_cannot_be_read_stops_it_by_name(self, root, tmp_path):
        shutil.copytree(root / "source", tmp_path / "source")
        broken = tmp_path / "source/bee/01.png"
        broken.write_bytes(broken.read_bytes()[:300])
        with pytest.raises(DataError, match=f"cannot read the image '{broken}'"):
            prepare(root, tmp_path / "data", source=tmp_path / "source")

    def test_a_begun_folder_cannot_be_trained_on(self, root, whole, tmp_path):
        with pytest.raises(DataError, match="was the preparation interrupted"):
            prepare(root, tmp_path / "data", rank=0, world=2)
            read_listing(tmp_path / "data")


def words(root: Path, folder: Path) -> list[str]:
    options = ["--vae", root / "vae", "--resolution", SIDE, "--batch-size", BATCH, "--device", "cpu"]
    return [str(word) for word in ("data", "prepare", root / "source", folder, *options)]


def prepare_whole(root: Path, folder: Path) -> None:
    prepare(root, folder, threads=2)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(root, whole, tmp_path):
    wait, kills = random.Random(0), 0
    for attempt in range(200):
        process = PROCESSES.Process(target=prepare_whole, args=(root, tmp_path / "data"))
        process.start()
        process.join(wait.uniform(0, 0.02 * attempt))
        kills += process.is_alive()
        ended = process.exitcode == 0
        process.kill()
        process.join()
        if ended:
            break
    assert kills >= 5
    assert contents(tmp_path / "data") == contents(whole)


class TestProcesses:
    def test_killed_at_any_instant_it_ends_as_if_it_had_not_been(self, root, whole, tmp_path):
        """Killed as one process, ended by two: those of a machine with two GPUs, but for the GPUs."""
        folder, process = tmp_path / "data", PROCESSES.Process(target=prepare_whole, args=(root, tmp_path / "data"))
        process.start()
        while len(list(folder.glob("vae-sd/*/*.npy"))) < 2 * BATCH:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        left, before = contents(folder), {path: path.stat().st_mtime_ns for path in folder.glob("[iv]*/*/*.*")}
        assert 2 * BATCH <= sum(name.endswith(".npy") for name in left) < COUNT
        assert all(content == contents(whole)[name] for name, content in left.items() if not name.startswith(".tmp"))
        assert run_in_processes(words(root, folder), 2) == 0
        assert contents(folder) == contents(whole)
        assert all(path.stat().st_mtime_ns == then for path, then in before.items())

    @pytest.mark.slow  # the processes above are told by the same variables who they are
    def test_two_processes_of_torchrun_write_what_one_writes(self, root, whole, tmp_path):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "repa_lab"]
        subprocess.run([sys.executable, *launch, *words(root, tmp_path / "data")], capture_output=True, check=True)
        assert contents(tmp_path / "data") == contents(whole)

    def test_where_one_is_refused_all_end(self, root, tmp_path, capfd):
        assert run_in_processes([*words(root, tmp_path / "data"), "--device", "tpu"], 2) == 2
        assert set(capfd.readouterr().err.splitlines()) == {
            "--device: unknown device 'tpu'; allowed: auto, cpu, cuda",
        }

    def test_what_is_refused_has_no_bar_and_what_is_done_has_one(self, root, whole, tmp_path):
        options = ["--vae", str(root / "vae"), "--device", "cpu"]
        refused = CliRunner().invoke(
            app, ["data", "prepare", str(tmp_path / "nowhere"), str(tmp_path / "data"), *options]
        )
        assert (refused.exit_code, refused.stdout, refused.stderr) == (2, "", f"no folder '{tmp_path / 'nowhere'}'\n")
        done = CliRunner().invoke(app, words(root, whole))
        assert done.exit_code == 0
        assert f"{COUNT}/{COUNT}" in done.stdout.splitlines()[0]

    def test_what_is_refused_is_one_line(self, root, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        done = CliRunner().invoke(app, words(root, tmp_path))
        assert done.exit_code == 2
