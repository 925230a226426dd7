"""The preflight: what a sweep's runs share is made once, and what cannot be had is refused with the setting at fault."""

import pytest

import repa_lab.orchestration.worker as preparing
from repa_lab.orchestration.worker import RefusedError, prepare
from repa_lab.spec import RunOptions, load_spec
from tests.orchestration.conftest import IMAGES

CPU = RunOptions(device="cpu")


def configs(spec, **overrides):
    return [arm.config for arm in load_spec(spec, overrides).arms]


@pytest.mark.parametrize(
    ("overrides", "arm", "path", "message"),
    [
        ({"data.holdout": IMAGES}, 0, "data.holdout", "holding out 80 of 80 images leaves none to train on"),
        (
            {"regularizer.encoder.name": "resnet_nonsense"},
            1,
            "regularizer.encoder.name",
            "unknown encoder 'resnet_nonsense'",
        ),
        ({"evaluate.encoder.name": "resnet_nonsense"}, 0, "evaluate.encoder.name", "unknown encoder 'resnet_nonsense'"),
        (
            {"regularizer.encoder.name": "vit_tiny_patch16_224"},
            1,
            "regularizer.encoder.weights",
            "the weights of 'vit_tiny_patch16_224' are not in the local cache and the hub cannot be reached; give weights: FILE",
        ),
        ({"data.vae": "no/such-vae"}, 0, "data.vae", "cannot load the VAE 'no/such-vae'"),
    ],
)
def test_refusals_name_the_arm_the_setting_and_the_reason(tiny, tmp_path, monkeypatch, overrides, arm, path, message):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # or a hub that is not there is tried for a minute
    with pytest.raises(RefusedError) as caught:
        prepare(configs(tiny(), **overrides), CPU, tmp_path, lambda task: lambda done, total: None)
    assert (caught.value.config, caught.value.path) == (arm, path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "path"),
    [(RunOptions(device="cpu", precision="fp16"), "run.precision"), (RunOptions(device="cuda"), "run.device")],
)
def test_devices_that_are_not_there_are_refused_and_never_replaced(tiny, tmp_path, monkeypatch, options, path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RefusedError) as caught:
        prepare(configs(tiny()), options, tmp_path / "cache", lambda task: lambda done, total: None)
    assert caught.value.path == path
    assert not (tmp_path / "cache").exists()


def test_what_is_cached_is_not_computed_again(tiny, tmp_path):
    told = []

    def announce(task):
        return lambda done, total: told.append((task, done, total))

    prepare(configs(tiny()), CPU, tmp_path, announce)
    assert told[-1] == ("features of efficientnet_lite0", IMAGES, IMAGES)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    told.clear()
    prepare(configs(tiny()), CPU, tmp_path, announce)
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert sorted({path.suffix for path in files if path.suffix != ".json"}) == [".bin", ".npz"]


def test_what_several_arms_need_is_loaded_once_and_what_differs_for_each(tiny, tmp_path, monkeypatch):
    loaded = []
    for name in ("open_data", "open_targets", "open_extractor"):
        real = getattr(preparing, name)
        monkeypatch.setattr(preparing, name, lambda *args, real=real, name=name: (loaded.append(name), real(*args))[1])
    weights = {"regularizer.weight": [0.1, 0.2, 0.3], "data.holdout": [8, 16]}
    prepare(
        configs(tiny(axes=weights, compare={"baseline": {"regularizer.weight": 0.1}})),
        CPU,
        tmp_path,
        lambda task: lambda done, total: None,
    )
    assert loaded == 2 * ["open_data", "open_targets", "open_extractor"]  # the run's encoder is the protocol's as well
    loaded.clear()
    metrics = {"evaluate.metrics": [["frechet"], ["frechet", "kid"]]}
    prepare(
        configs(tiny(axes=metrics, compare={"baseline": {"evaluate.metrics": ["frechet"]}})),
        CPU,
        tmp_path,
        lambda task: lambda done, total: None,
    )
    assert loaded == ["open_data", "open_targets", "open_extractor", "open_extractor"]


def test_a_refusal_names_the_first_arm_that_has_the_setting(tiny, tmp_path):
    sizes = {"regularizer.encoder.name": ["efficientnet_lite0", "resnet_nonsense"], "regularizer.weight": [0.1, 0.2]}
    spec = tiny(axes=sizes, compare={"baseline": {"regularizer.weight": 0.1}})
    with pytest.raises(RefusedError) as caught:
        prepare(configs(spec), CPU, tmp_path, lambda task: lambda done, total: None)
    assert (caught.value.config, caught.value.path) == (2, "regularizer.encoder.name")
