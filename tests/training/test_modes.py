"""Options say how a run is computed, never what: micro-batches, checkpointed gradients, compilation, several processes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from repa_lab.data.sources import Flips
from repa_lab.encoders.encoder import Encoder
from repa_lab.orchestration.api import run_one
from repa_lab.runs import RunDirectory, RunsRoot, State
from repa_lab.training.batches import open_images
from repa_lab.training.device import DeviceError, require_equal_parts
from repa_lab.training.trainer import Trainer
from tests.data.conftest import noise_image
from tests.data.test_space import save_vae
from tests.rounding import LITE0, rounding
from tests.training.conftest import (
    PASS,
    PLAIN_DESCENT,
    SETTINGS,
    SIT_DOWN,
    UNET,
    assert_same,
    make_options,
    make_run,
    make_steps,
    rows,
    run_steps,
    run_to_end,
    start_processes,
    weights,
    write_spec,
)

FAMILIES = {
    "sit": {},
    "unet": {**UNET, "regularizer.type": "urepa"},
    "sit_down": {**SIT_DOWN, "regularizer.type": "urepa"},
}
families = pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES.keys())
# The encoder's rounding depends on the batch that it runs in: losses of features are off by as much as these are.
FEATURES = rounding(np.ones(1), LITE0)
# Weight 0 before and after: the projector rests, is trained, and rests again.
SCHEDULED = {"regularizer.schedule": {"type": "linear", "warmup_steps": 1, "decay_steps": 3}, "train.weight_decay": 0.1}


@families
@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_train_as_the_batch_does(settings, size, trained):
    settings = {**settings, **SCHEDULED, **PLAIN_DESCENT}
    parts, whole = trained(options={"micro_batch": size}, **settings), trained(**settings)
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=PASS, abs=PASS)


@families
@pytest.mark.parametrize("size", [1, 4])
def test_gradients_of_micro_batches_add_up_to_the_batchs(settings, size, trained):
    found, expected = (
        # After one step AdamW's first moment is a tenth of the gradient.
        {name: value for name, value in weights(ended).items() if name.endswith("exp_avg")}
        for ended in (trained(1, {"micro_batch": n}, **settings) for n in (size, None))
    )
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * largest.item(), msg=name)


def test_a_micro_batch_is_all_that_is_seen_at_a_time(cache):
    trainer = Trainer(make_run(), make_options(micro_batch=4), cache)
    seen: list[int] = []
    trainer.state.denoiser.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    trainer.step(next(trainer.batches()))
    assert seen == [4, 2]


@families
def test_checkpointing_gradients_changes_no_bit(settings, trained):
    plain = trained(**settings, **SCHEDULED)
    checkpointed = trained(options={"gradient_checkpointing": True}, **settings, **SCHEDULED)
    assert_same(weights(plain), weights(checkpointed))
    assert rows(plain) == rows(checkpointed)


@families
def test_checkpointing_gradients_runs_blocks_again(settings, cache):
    calls: dict[bool, int] = {}
    for on in (False, True):
        trainer = Trainer(make_run(**settings), make_options(gradient_checkpointing=on), cache)
        denoiser = trainer.state.denoiser
        layer = (
            denoiser.blocks[2].mlp.fc2 if hasattr(denoiser, "blocks") else denoiser.net.down_blocks[0].resnets[0].conv1
        )
        counted: list[int] = []
        layer.register_forward_pre_hook(lambda module, inputs, counted=counted: counted.append(1))
        trainer.step(next(trainer.batches()))
        calls[on] = len(counted)
    assert calls == {False: 1, True: 2}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@families
def test_compiling_trains_alike_and_measures(settings, backend, cache, fresh, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run = make_run(**settings, **SCHEDULED, **PLAIN_DESCENT, **{"train.steps": 4})
    plain, compiled = run_to_end(run, fresh("plain"), cache), run_to_end(run, fresh("compiled"), cache, compile=True)
    measured = rows(compiled)[-1]
    assert {"heldout/cka", "heldout/cosine"} <= measured.keys()
    for ours, theirs in zip(rows(compiled), rows(plain), strict=True):
        # Of a distance of samples, in which a pixel may have fallen to the next grey level; the losses are far nearer.
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_similarity_cutoff_survives_interruption_to_the_bit(mode, stop, cache, trained, fresh):
    cutoff = {"similarity_threshold": -0.9, "similarity_min_count": 3, "threshold_mode": mode, "probe_every": 2}
    settings = {"regularizer.schedule": cutoff, "train.steps": 7, "train.weight_decay": 0.1}
    whole = trained(6, **settings)
    assert [row["align/weight"] for row in rows(whole)] == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
    looked = [row["step"] - 1 for row in rows(whole) if "align/cosine" in row]
    assert looked == ([0, 1, 2, 4] if mode == "recoverable" else [0, 1, 2])
    parts = fresh("parts")
    for steps in (stop, 6 - stop):
        run_steps(make_run(**settings), parts, cache, steps)
    assert rows(parts) == rows(whole)
    assert_same(weights(parts), weights(whole))


def test_an_encoder_sees_no_more_than_it_should(cache, monkeypatch):
    seen: list[int] = []
    preprocess = Encoder.preprocess
    monkeypatch.setattr(
        Encoder, "preprocess", lambda self, pixels: seen.append(len(pixels)) or preprocess(self, pixels)
    )
    online = make_run(**{"regularizer.encoder": {**SETTINGS["regularizer"]["encoder"], "cache": False}})
    trainer = Trainer(online, make_options(encoder_batch_size=4), cache)
    seen.clear()
    trainer.step(next(trainer.batches()))
    assert seen == [4, 2]


class TestReadingAhead:
    """What targets are made from is loaded with the batch, by the data loader's processes where there are any."""

    def trainer(self, cache, options=None, **settings) -> Trainer:
        return Trainer(make_run(**settings), make_options(**(options or {})), cache)

    def test_cached_features_come_as_they_are_stored(self, cache):
        trainer = self.trainer(cache)
        batch = next(trainer.batches())
        (loaded,) = batch.loaded
        assert (loaded.dtype, loaded.shape) == (torch.float16, (6, 2, 2, 112))
        (targets,) = trainer.aligner.targets.values()
        tokens = targets(batch.ids, torch.device("cpu"))
        assert torch.equal(loaded.float().flatten(1, 2), tokens.values)

    def test_an_online_encoders_pixels_do(self, cache, images):
        online = {"regularizer.encoder": {**SETTINGS["regularizer"]["encoder"], "cache": False}}
        batch = next(self.trainer(cache, **online).batches())
        assert torch.equal(batch.loaded[0], images.source.read(batch.ids.tolist()))

    def test_nothing_is_read_where_the_weight_is_0(self, cache):
        schedule = {"type": "constant", "warmup_steps": 1, "cutoff_step": 3}
        steps = self.trainer(cache, **{"regularizer.schedule": schedule})._steps
        assert [len(steps[n].loaded) for n in range(5)] == [0, 1, 1, 0, 0]
        assert [len(self.trainer(cache, regularizer={"type": "none"})._steps[0].loaded)] == [0]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_nothing_more_is_read_once_a_similarity_cutoff_holds(self, workers, cache):
        """It holds from the second step on; a loader's process is two batches ahead by then, and looks are not foreseen."""
        cutoff = {
            "similarity_threshold": -1.0,
            "similarity_min_count": 1,
            "threshold_mode": "recoverable",
            "probe_every": 4,
        }
        trainer = self.trainer(cache, {"data_workers": workers}, **{"regularizer.schedule": cutoff, "train.steps": 9})
        found = []
        for batch in trainer.batches():
            outcome = trainer.step(batch)
            found.append((len(batch.loaded), "align/cosine" in outcome.row()))
        assert [is_asked for _, is_asked in found] == [True, False, False, False, True, False, False, False, True]
        ahead = 4 if workers else 2  # asked for before the second step found the cutoff
        assert found[0][0] == 1 and not any(read for read, _ in found[ahead:])

    def test_micro_batches_get_their_rows(self, cache):
        batch = next(self.trainer(cache).batches())
        parts = batch.split(4)
        assert [len(part.ids) for part in parts] == [4, 2]
        assert torch.equal(torch.cat([part.loaded[0] for part in parts]), batch.loaded[0])
        assert torch.equal(torch.cat([part.x for part in parts]), batch.x)

    @pytest.mark.parametrize("kept", [True, False])
    def test_processes_of_the_loader_change_nothing(self, kept, trained):
        settings = {"regularizer.encoder": {**SETTINGS["regularizer"]["encoder"], "cache": kept}}
        ended = [trained(options=options, **settings) for options in (None, {"data_workers": 2})]
        assert_same(weights(ended[0]), weights(ended[1]))
        assert rows(ended[0]) == rows(ended[1])


def test_stored_in_float32_features_train_as_fresh_ones_do(trained):
    fresh_ones = trained(**{"regularizer.encoder": {**SETTINGS["regularizer"]["encoder"], "cache": False}})
    kept, halved = (trained(options={"encoder_storage": kind}) for kind in ("fp32", "fp16"))
    for ours, theirs in zip(rows(kept), rows(fresh_ones), strict=True):
        assert ours == pytest.approx(theirs, rel=FEATURES, abs=FEATURES)
    for ours, theirs in zip(rows(halved), rows(fresh_ones), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
        assert ours["align/cosine"] != theirs["align/cosine"]


class TestFlips:
    @pytest.fixture
    def mirrored(self, cache):
        return open_images(make_run(**{"data.flip": True}).config.data, cache)

    def test_half_of_what_is_seen_is_mirrored_and_nothing_else_changes(self, images, mirrored):
        plain, flipped = (make_steps(one, **{"train.batch_size": 500}) for one in (images, mirrored))
        ours, theirs = flipped[3], plain[3]
        is_mirrored = ours.ids >= 1797
        assert 0.4 < is_mirrored.float().mean() < 0.6
        assert torch.equal(ours.ids % 1797, theirs.ids)
        for name in ("noise", "t"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.condition["y"], theirs.condition["y"])
        expected = torch.where(is_mirrored.view(-1, 1, 1, 1), theirs.x.flip(-1), theirs.x)
        assert torch.equal(ours.x, expected)

    def test_the_coin_falls_anew_in_every_epoch_and_alike_in_every_arm(self, mirrored):
        steps = make_steps(mirrored, **{"train.batch_size": 1700})
        first, second = ({int(i) % 1797: int(i) >= 1797 for i in steps[n].ids} for n in (0, 1))
        both = first.keys() & second.keys()
        assert 0.4 < sum(first[i] == second[i] for i in both) / len(both) < 0.6
        other = make_steps(mirrored, **{"train.batch_size": 1700, "regularizer.weight": 0.0})
        assert torch.equal(other[1].ids, steps[1].ids)

    def test_targets_are_those_of_the_mirrored_images(self, tmp_path, fresh):
        (images := tmp_path / "images").mkdir()
        for number in range(40):
            noise_image(number, (8, 8)).save(images / f"{number}.png")
        data = {"source": "imagefolder", "path": str(images), "resolution": 8, "holdout": 16, "flip": True}
        encoder = {"regularizer.encoder": {**SETTINGS["regularizer"]["encoder"], "cache": False}}
        kept = run_steps(make_run(data=data), fresh("kept"), tmp_path / "cache", encoder_storage="fp32")
        online = run_steps(make_run(data=data, **encoder), fresh("online"), tmp_path / "cache")
        for ours, theirs in zip(rows(kept), rows(online), strict=True):
            assert ours == pytest.approx(theirs, rel=FEATURES, abs=FEATURES)

    def test_nothing_is_measured_on_mirrored_images(self, mirrored):
        assert isinstance(mirrored.source, Flips)
        assert mirrored.split.held_out.max() < 1797
        assert mirrored.split.train.max() < 1797


class TestPixels:
    @pytest.fixture
    def latents(self, tmp_path):
        folder = tmp_path / "images"
        folder.mkdir()
        for i in range(12):
            noise_image(i, (16, 16)).save(folder / f"{i}.png")
        save_vae(tmp_path / "vae")
        data = {
            "source": "imagefolder",
            "path": str(folder),
            "resolution": 16,
            "vae": str(tmp_path / "vae"),
            "holdout": 4,
        }
        return {"data": data, "model.size": "nano/4", "train.batch_size": 4}

    @pytest.mark.parametrize("pixels", ["image", "vae"])
    def test_a_warm_start_opens_no_image(self, latents, tmp_path, audited, pixels):
        encoder = {**SETTINGS["regularizer"]["encoder"], "pixels": pixels}
        run = make_run(**{**latents, "regularizer.encoder": encoder})

        def first_step() -> list[int]:
            trainer = Trainer(run, make_options(), tmp_path / "cache")
            batch = next(trainer.batches())
            trainer.step(batch)
            return [*batch.ids.tolist(), *trainer._steps._images.space.frames(batch.ids).flatten().tolist()]

        with audited("open") as opened:
            cold = first_step()
            assert any(str(path).endswith(".png") for path, *_ in opened)
            opened.clear()
            assert first_step() == cold
            assert not [path for path, *_ in opened if str(path).endswith(".png")]

    def test_the_encoder_sees_what_the_spec_says(self, latents, tmp_path, fresh):
        encoder = SETTINGS["regularizer"]["encoder"]
        losses = {}
        for pixels in ("image", "vae"):
            for cached in (True, False):
                settings = {**latents, "regularizer.encoder": {**encoder, "pixels": pixels, "cache": cached}}
                run = make_run(**settings)
                directory = run_steps(run, fresh(f"{pixels}{cached}"), tmp_path / "cache", encoder_storage="fp32")
                losses[pixels, cached] = [row["align/cosine"] for row in rows(directory)]
        assert losses["image", True] == pytest.approx(losses["image", False], abs=FEATURES)
        assert losses["vae", True] == pytest.approx(losses["vae", False], abs=FEATURES)
        assert losses["vae", True] != pytest.approx(losses["image", True], abs=1e-3)


@pytest.mark.parametrize(("size", "processes"), [(6, 4), (1, 2)])
def test_a_batch_that_cannot_be_shared_equally_is_refused(size, processes):
    with pytest.raises(DeviceError, match=f"train.batch_size {size} cannot be shared equally by {processes} processes"):
        require_equal_parts(size, processes)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_a_batch_are_the_batch(images, processes):
    whole = make_steps(images)[5]
    parts = [make_steps(images, part=(number, processes))[5] for number in range(processes)]
    for name in ("ids", "x", "noise", "t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.condition["y"] for part in parts]), whole.condition["y"])


class TestProcesses:
    """The README's command for several GPUs, here with two processes on the CPU."""

    SPEC: ClassVar[dict[str, Any]] = {
        **SETTINGS,
        "name": "two",
        "model": {"family": "unet", "size": "nano"},
        "train": {"steps": 6, "batch_size": 6, "lr": 1e-3, "ema": 0.9, "weight_decay": 0.1},
        "evaluate": {**SETTINGS["evaluate"], "every": 3, "samples": 20, "batch_size": 6},
        "regularizer": {
            **SETTINGS["regularizer"],
            "type": "urepa",
            "schedule": {"type": "linear", "warmup_steps": 2, "decay_steps": 5},
        },
    }
    LONGER: ClassVar[dict[str, Any]] = {
        "train": {**SPEC["train"], "steps": 60},
        "evaluate": {**SPEC["evaluate"], "every": 60},
    }

    def test_two_processes_train_what_one_does_and_one_of_them_writes(self, tmp_path):
        (images := tmp_path / "images").mkdir()
        for number in range(60):
            noise_image(number, (8, 8)).save(images / f"{number}.png")
        data = {"data": {"source": "imagefolder", "path": str(images), "resolution": 8, "holdout": 20}}
        spec = write_spec(tmp_path / "alone", self.SPEC | data)
        first, state = run_one(spec, None, None, spec.parent / "runs")
        assert state is State.DONE
        spec = write_spec(tmp_path / "together", self.SPEC | data, device="auto", micro_batch=2)  # with a cache to fill
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, "-m", "repa_lab", "run", str(spec), "--root", str(spec.parent / "runs")]
        no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=no_gpu)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("done:") == 1
        (second,) = RunsRoot(spec.parent / "runs").runs()
        assert first.run_id == second.run_id
        assert [row["step"] for row in rows(second)] == [1, 2, 3, 3, 4, 5, 6, 6]
        for ours, theirs in zip(rows(second), rows(first), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)
        assert [row["align/weight"] for row in rows(second) if "align/weight" in row] == pytest.approx(
            [0.0, 0.25, 0.5, 1 / 3, 1 / 6, 0.0]
        )
        assert [event["event"] for event in second.events()] == ["running", "done"]
        assert json.loads((second.path / "state.json").read_text())["step"] == 6
        assert [run.provenance["processes"] for run in (first, second)] == [1, 2]
        assert [run.provenance["options"]["micro_batch"] for run in (first, second)] == ["auto", 2]

    @pytest.fixture(scope="class")
    def whole(self, cache, tmp_path_factory) -> RunDirectory:
        """The longer run, in one process and uninterrupted."""
        spec = write_spec(tmp_path_factory.mktemp("whole"), self.SPEC | self.LONGER, cache)
        return run_one(spec, None, None, spec.parent / "runs")[0]

    @pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
    def test_what_was_killed_goes_on_with_another_number_of_processes(self, whole, cache, tmp_path, before, after):
        spec, root = (
            write_spec(tmp_path, self.SPEC | self.LONGER, cache, checkpoint_every=5),
            RunsRoot(tmp_path / "runs"),
        )
        processes = start_processes(spec, before)
        while not any((run.checkpoints / "step-00000010").exists() for run in root.runs()):
            assert processes[0].is_alive()
            time.sleep(0.005)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        (directory,) = root.runs()
        assert directory.state.state is State.RUNNING
        resumed = start_processes(spec, after)
        for process in resumed:
            process.join()
        assert [process.exitcode for process in resumed] == [0] * after
        assert directory.state.state is State.DONE
        assert "resumed" in [event["event"] for event in directory.events()]
        assert [row["step"] for row in rows(directory)] == [row["step"] for row in rows(whole)]
        for ours, theirs in zip(rows(directory), rows(whole), strict=True):
            assert ours["step"] > 20 or ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)
        assert rows(directory)[-2]["loss/total"] == pytest.approx(rows(whole)[-2]["loss/total"], rel=0.1)
