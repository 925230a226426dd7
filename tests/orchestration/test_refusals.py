"""What files at hand rule out: `plan` says so in one line with its place, and so does the worker that would train."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import repa_lab
from repa_lab.models.families import FAMILIES
from repa_lab.models.tiny import write_tiny_pipeline
from repa_lab.orchestration.plan import make_plan
from repa_lab.orchestration.worker import prepare
from repa_lab.runs import RunsRoot
from repa_lab.spec import SpecError, load_spec
from repa_lab.training.resolve import Inventory
from repa_lab.training.trainer import Trainer
from tests.data.conftest import noise_image

ENCODER = {"name": "efficientnet_lite0", "image_size": 32}
EXTRACTOR = {"name": "efficientnet_lite0"}


def folder(count, classes=1, side=16):
    path = Path(f"images-{count}-{classes}")
    for number in range(count):
        (path / str(number % classes)).mkdir(parents=True, exist_ok=True)
        noise_image(number, (side, side)).save(path / str(number % classes) / f"{number}.png")
    return {"source": "imagefolder", "path": str(path), "resolution": side}


def saved(columns):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [noise_image(number) for number in range(40)], **columns}
    features = {"image": datasets.Image()} | {
        name: datasets.Value("string" if isinstance(v[0], str) else "int64") for name, v in columns.items()
    }
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk("saved")
    return {"source": "datasets", "path": "saved", "resolution": 16}


def vae(**config):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**blocks, block_out_channels=[4, 4], norm_num_groups=2, **config).save_pretrained("vae")
    return "vae"


def pipeline(family, **parts):
    """A tiny pipeline whose files are changed: JSON fields are laid over, None deletes a file or folder."""
    write_tiny_pipeline(FAMILIES[family], Path("pipe"))
    for name, change in parts.items():
        path = Path("pipe", name.replace("__", "/"))
        if change is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return {"family": family, "pretrained": "pipe"}


def scratch(data, **changes):
    return {"data": data, **changes}


def tuned(model, data, **changes):
    return {"model": model, "regularizer": {"type": "none"}, "data": data, **changes}


SPLIT = "alignment is measured on held-out images: hold out 4 or more"
WEIGHTS = "transformer__diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler__scheduler_config.json"
CASES = {
    "all held out": (
        lambda: scratch(folder(20) | {"holdout": 20}),
        "data.holdout: holding out 20 of 20 images leaves none to train on",
        "holding out 20 of 20 images leaves none to train on",
    ),
    "too few held out by default": (
        lambda: scratch(folder(20), regularizer={"type": "repa", "encoder": ENCODER}),
        f"data.holdout: {SPLIT}; 2 of 20 are held out by default",
        SPLIT,
    ),
    "too few held out": (
        lambda: scratch(folder(40) | {"holdout": 3}, regularizer={"type": "repa", "encoder": ENCODER}),
        f"data.holdout: {SPLIT}; 3 of 40 are held out",
        SPLIT,
    ),
    "too few real images": (
        lambda: scratch(folder(4), evaluate={"extractor": EXTRACTOR, "metrics": ["frechet", "precision_recall"]}),
        "evaluate.metrics: precision_recall needs at least 4 real images, and there are 3 training images: give more",
        "precision_recall needs at least 4 real images, and there are 3",
    ),
    "processes": (
        lambda: scratch(folder(20), train={"steps": 2, "batch_size": 5}, run={"gpus_per_run": 2}),
        "train.batch_size: 2 processes (run.gpus_per_run) cannot share a batch equally",
        None,
    ),
    "half precision on a CPU": (
        lambda: scratch(folder(20), run={"precision": "fp16", "device": "cpu"}),
        "run.precision: fp16 needs a GPU; use bf16 or fp32",
        "fp16 needs a GPU; use bf16 or fp32",
    ),
    "channels of the VAE": (
        lambda: scratch(folder(20) | {"vae": vae(in_channels=1)}),
        "data.vae: the VAE takes 1 channels, the images have 3",
        "the VAE takes 1 channels, the images have 3",
    ),
    "no VAE": (
        lambda: (Path("vae").mkdir(), scratch(folder(20) | {"vae": "vae"}))[1],
        "data.vae: 'vae' has no VAE: neither config.json nor vae/config.json can be read",
        "cannot load the VAE 'vae'",
    ),
    "patches of latents": (
        lambda: scratch(folder(20, side=12) | {"vae": vae()}),
        "data.resolution: 12 px is not a multiple of 8, the pixels of a token of sit nano/4 in the latents of 'vae'",
        "input size (6, 6) is not a multiple of the patch size 4",
    ),
    "no column of images": (
        lambda: (
            saved({"text": ["a"] * 40}),
            _without_images(),
            scratch({"source": "datasets", "path": "saved", "resolution": 16}),
        )[2],
        "data.path: no column of images in 'saved'; there are: text",
        "no column of images in 'saved'; there are: text",
    ),
    "no such column": (
        lambda: scratch(saved({"text": ["a"] * 40}) | {"caption_column": "prompt"}),
        "data.caption_column: no column 'prompt'; there are: image, text",
        "no column 'prompt'; there are: image, text",
    ),
    "no column of texts": (
        lambda: scratch(saved({"count": [1] * 40}) | {"caption_column": "count"}),
        "data.caption_column: column 'count' holds no texts; of texts there are: none",
        "column 'count' holds no texts; of texts there are: none",
    ),
    "no data set": (
        lambda: scratch({**folder(20), "source": "datasets"}),
        "data.path: 'images-20-1' is not what Dataset.save_to_disk writes",
        "'images-20-1' is not what Dataset.save_to_disk writes",
    ),
    "classes": (
        lambda: tuned(pipeline("dit"), folder(1100, classes=1100)),
        "data.path: the images have 1100 classes, and the pretrained model knows",
        "the images have 1100 classes, and the pretrained model knows",
    ),
    "no weights": (
        lambda: tuned(pipeline("dit", **{WEIGHTS: None}), folder(20)),
        "model.pretrained: 'pipe' has no weights in transformer/: save a complete DiTPipeline there first",
        "'pipe' has no weights in transformer/: save a complete DiTPipeline there first",
    ),
    "no scheduler": (
        lambda: tuned(pipeline("dit", scheduler=None), folder(20)),
        "model.pretrained: 'pipe' has no folder scheduler/: save a complete DiTPipeline there first",
        "'pipe' has no folder scheduler/: save a complete DiTPipeline there first",
    ),
    "unknown prediction": (
        lambda: tuned(pipeline("dit", **{SCHEDULER: {"prediction_type": "vibes"}}), folder(20)),
        "model.pretrained: prediction_type 'vibes' is not known; known: epsilon, v_prediction, sample",
        "prediction_type 'vibes' is not known; known: epsilon, v_prediction, sample",
    ),
    "block of a small model": (
        lambda: tuned(pipeline("dit"), folder(40), regularizer={"type": "repa", "encoder": ENCODER, "block_index": 20}),
        "regularizer.block_index: dit has 3 blocks: block_index must be 0 to 2, got 20",
        "dit: block_index must be 0 to 2, got 20",
    ),
}


def _without_images():
    import datasets

    shutil.rmtree("saved")
    datasets.Dataset.from_dict({"text": ["a"] * 40}).save_to_disk("saved")


def refusal(experiment):
    """What a worker says before the first step: in preparing, or in building the run."""
    inventory = Inventory()
    with pytest.raises(Exception) as caught:  # whatever kind it is, it must say this
        for arm in experiment.arms:
            config = inventory.resolve(arm.config) if arm.config.data.source == "imagefolder" else arm.config
            prepare([config], experiment.run, Path("cache"), lambda task: lambda done, total: None)
            Trainer(repa_lab.spec.identity.Run("id", config, 0), experiment.run, Path("cache"))
    return str(caught.value)


@pytest.mark.parametrize(("make", "planned", "refused"), CASES.values(), ids=CASES.keys())
def test_plan_refuses_what_a_run_refuses(tmp_path, monkeypatch, make, planned, refused):
    monkeypatch.chdir(tmp_path)
    spec = {
        "name": "bad",
        "model": {"family": "sit", "size": "nano/4"},
        "regularizer": {"type": "none"},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"samples": 16, "extractor": EXTRACTOR},
        **make(),
    }
    spec["run"] = {"device": "cpu", **spec.get("run", {})}
    Path("spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    experiment = load_spec("spec.yaml")
    with pytest.raises(SpecError) as caught:
        make_plan(experiment, RunsRoot(Path("runs")))
    (line,) = str(caught.value).splitlines()
    place, _, message = line.partition(": ")
    assert place.startswith("spec.yaml:") and message.startswith(planned), line
    assert not Path("runs").exists()
    if refused is not None:
        assert refusal(experiment).startswith(refused)


def test_a_small_set_holds_out_a_tenth_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {
        "name": "small",
        "model": {"family": "sit", "size": "nano/4"},
        "regularizer": {"type": "none"},
        "train": {"steps": 2},
    }
    small = make_plan(load_spec({**base, "data": folder(20)}), RunsRoot(Path("runs")))
    assert small.warnings[:1] == ["2 of 20 images are held out, for a tenth is less than 256 (data.holdout)"]
    (written,) = make_plan(load_spec({**base, "data": folder(20) | {"holdout": 2}}), RunsRoot(Path("runs"))).pending
    assert [written] == list(small.pending) and written.config.data.holdout == 2  # the same run, whoever asks for it
    config = small.runs[0].arm.config.data
    assert [config.held_out(count) for count in (1, 9, 19, 20, 2559, 2560, 10**6, None)] == [
        1,
        1,
        1,
        2,
        255,
        256,
        256,
        256,
    ]
