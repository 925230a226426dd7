"""A question small enough to be answered in seconds by the real machinery."""

import copy

import pytest
from PIL import Image
from sklearn.datasets import load_digits

IMAGES = 80
TINY = {
    "name": "tiny",
    "question": "Does it run?",
    "model": {"family": "sit", "size": "nano/4"},
    "regularizer": {
        "type": "repa",
        "encoder": {"name": "efficientnet_lite0", "image_size": 32},
        "projector": {"width": 16},
    },
    "data": {"source": "digits"},
    "train": {"steps": 6, "batch_size": 8, "lr": 1e-3, "ema": 0.5},
    "evaluate": {
        "every": 3,
        "samples": 16,
        "sampler": {"steps": 2},
        "extractor": {"name": "efficientnet_lite0"},
        "encoder": {"name": "efficientnet_lite0", "image_size": 32},
    },
    "axes": {"alignment": {"baseline": {"regularizer.type": "none"}, "aligned": {}}},
    "seeds": 2,
    "run": {"device": "cpu", "log_every": 1, "wandb": {"mode": "disabled"}},
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A fresh copy of the tiny experiment, to be changed at will; every root computes the features of a few digits only."""
    folder, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for number in range(IMAGES):
        path = folder / f"{digits.target[number]}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype("uint8")).save(path)
    data = {"source": "imagefolder", "path": str(folder), "resolution": 8, "holdout": 16}
    return lambda **changes: {**copy.deepcopy(TINY), "data": dict(data), **changes}
