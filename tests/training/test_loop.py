"""What must always hold of a run (DESIGN, section 5)."""

from __future__ import annotations

import json
import math

import pytest
import torch

from repa_lab.encoders import targets as targets_module
from repa_lab.encoders.encoder import Encoder, load_encoder
from repa_lab.runs import RunDirectory, RunWriter, State, checkpoints
from repa_lab.runs import directory as directory_module
from repa_lab.training import aligner as aligner_module
from repa_lab.training.device import DeviceError
from repa_lab.training.diffusion import FieldSampler
from repa_lab.training.evaluate import DivergedError
from repa_lab.training.loop import train
from repa_lab.training.trainer import Trainer
from tests.data.conftest import noise_image
from tests.data.test_space import save_vae
from tests.training.conftest import (
    OFF,
    SIT_DOWN,
    UNET,
    assert_same,
    make_options,
    make_run,
    rows,
    run_steps,
    run_to_end,
    stop_after,
    weights,
)

UREPA = {"regularizer.type": "urepa"}


# A linear schedule: the projector rests at first, is trained, and rests again.
RESUMED = {
    "train.steps": 9,
    "train.ema": {"decay": 0.9, "warmup": True},  # every update depends on the number of the step
    "evaluate.every": 6,
    "regularizer.schedule": {"type": "linear", "warmup_steps": 2, "decay_steps": 6},
}
OFTEN = {"log_every": 2, "checkpoint_every": 3}
ABSURD = {"train.lr": 1e30, "train.grad_clip": None}
# Weight decay and clipping would both see a projector that takes part.
ALL_AT_WORK = {"train.weight_decay": 0.1, "train.grad_clip": 0.5, "train.lr": 1e-2}
OFF_ARMS = {
    "sit": ({**OFF}, {"regularizer.weight": 0.0}, {**UREPA, "regularizer.weight": 0.0}),
    "unet": ({**UNET, **OFF}, {**UNET, **UREPA, "regularizer.weight": 0.0}),
}


def step_rows(directory: RunDirectory) -> list[dict]:
    return [row for row in rows(directory) if "loss/total" in row]


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The encoders that a run loaded."""
    names: list[str] = []

    def counted(name, *args):
        names.append(name)
        return load_encoder(name, *args)

    for module in (targets_module, aligner_module):
        monkeypatch.setattr(module, "load_encoder", counted)
    return names


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The batch sizes in which an encoder was run."""
    sizes: list[int] = []
    forward = Encoder.forward

    def counted(self, pixels):
        sizes.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(Encoder, "forward", counted)
    return sizes


class TestOffMeansOff:
    @pytest.mark.parametrize("family", OFF_ARMS)
    def test_weight_0_trains_as_no_regularizer_does(self, family, trained):
        ended = [trained(**arm, **ALL_AT_WORK) for arm in OFF_ARMS[family]]
        baseline, losses = weights(ended[0]), step_rows(ended[0])
        assert len(losses) == 4
        assert losses[0]["grad_norm"] > 0.5  # so that clipping took place
        for other in ended[1:]:
            assert_same(baseline, weights(other), only="denoiser:")
            assert_same(baseline, {k: v for k, v in weights(other).items() if "regularizer." not in k}, only="ema:")
            found = step_rows(other)
            assert [row.pop("align/weight") for row in found] == [0.0] * 4
            assert found == losses

    def test_a_weight_above_0_does_not(self, trained):
        off, on = weights(trained(**OFF, **ALL_AT_WORK)), weights(trained(**ALL_AT_WORK))
        assert any(not torch.equal(off[name], on[name]) for name in off if name.startswith("denoiser:blocks.0"))

    def test_none_loads_no_encoder(self, cache, fresh, loads, encoded):
        directory = run_to_end(make_run(**OFF), fresh(), cache)
        assert (loads, encoded) == ([], [])
        assert not any("align" in name or "heldout" in name for row in directory.rows() for name in row)
        assert not list(directory.checkpoints.rglob("regularizer*"))

    def test_a_step_of_weight_0_runs_no_encoder(self, cache, fresh, encoded):
        online = {"name": "efficientnet_lite0", "image_size": 32, "cache": False}
        schedule = {"type": "constant", "cutoff_step": 2}
        settings = {"regularizer.encoder": online, "regularizer.schedule": schedule}
        directory = run_steps(make_run(**settings), fresh("cut"), cache)
        assert encoded.count(6) == 2  # batches; the preflight takes 4 images
        assert ["loss/aligned" in row for row in step_rows(directory)] == [True, True, False, False]
        encoded.clear()
        run_steps(make_run(**{"regularizer.encoder": online, "regularizer.weight": 0.0}), fresh("zero"), cache)
        assert encoded.count(6) == 0

    def test_one_encoder_serves_training_and_measuring(self, cache, loads):
        online = {"name": "efficientnet_lite0", "image_size": 32, "cache": False}
        Trainer(make_run(**{"regularizer.encoder": online}), make_options(), cache)
        assert loads == ["efficientnet_lite0"]
        loads.clear()
        Trainer(make_run(**{"regularizer.encoder": online, "evaluate.encoder": online}), make_options(), cache)
        assert loads == ["efficientnet_lite0"]
        loads.clear()
        measured = {**online, "image_size": 48}
        Trainer(make_run(**{"regularizer.encoder": online, "evaluate.encoder": measured}), make_options(), cache)
        assert loads == ["efficientnet_lite0"] * 2


class TestPairing:
    def denoiser(self, cache, seed: int = 0, **settings) -> dict[str, torch.Tensor]:
        trainer = Trainer(make_run(seed, **settings), make_options(), cache)
        return {name: value.clone() for name, value in trainer.state.denoiser.state_dict().items()}

    @pytest.mark.parametrize("family", [{}, UNET], ids=["sit", "unet"])
    def test_arms_with_one_seed_start_alike(self, cache, family):
        first = self.denoiser(cache, **family, **OFF)
        torch.manual_seed(99)
        for arm in ({"regularizer.projector.width": 7}, UREPA, {"regularizer.weight": 3.0}, {"train.lr": 1.0}):
            assert_same(first, self.denoiser(cache, **family, **arm))
        other = self.denoiser(cache, 1, **family, **OFF)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_sampling_starts_alike_too(self, cache, fresh):
        # At learning rate 1e-9 nothing is learned: arms with one seed then draw the same samples, other seeds do not.
        settings = {"train.lr": 1e-9, "train.steps": 1}
        drawn = [
            run_to_end(make_run(seed, **settings, **arm), fresh(f"{number}"), cache).sample_grids()[1].read_bytes()
            for number, (seed, arm) in enumerate([(0, {}), (0, OFF), (1, OFF)])
        ]
        assert drawn[0] == drawn[1] != drawn[2]


class TestRows:
    def test_the_total_is_the_sum_of_its_weighted_parts(self, cache, fresh):
        settings = {**UNET, **UREPA, "regularizer.weight": 0.7, "regularizer.manifold_weight": 2.5}
        found = step_rows(run_steps(make_run(**settings), fresh(), cache))
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        assert [row["images"] for row in found] == [6, 12, 18, 24]
        for row in found:
            aligned = 0.7 * (-row["align/cosine"] + 2.5 * row["align/manifold"])
            assert row["loss/aligned"] == pytest.approx(aligned, rel=1e-5)
            assert row["loss/total"] == pytest.approx(row["loss/denoise"] + aligned, rel=1e-6)
            assert row["align/weight"] == 0.7
            assert row["align/manifold"] > 1e-3

    def test_repa_has_no_manifold_term(self, trained):
        for row in step_rows(trained()):
            assert "align/manifold" not in row
            assert row["loss/total"] == pytest.approx(row["loss/denoise"] - 0.5 * row["align/cosine"], rel=1e-6)

    def test_the_schedules_weight_is_the_one_of_the_steps_before(self, cache, fresh):
        schedule = {"type": "linear", "warmup_steps": 2, "decay_steps": 4}
        directory = run_steps(make_run(**{"regularizer.schedule": schedule, "train.steps": 7}), fresh(), cache, steps=6)
        found = {row["step"]: (row["align/weight"], "align/cosine" in row) for row in step_rows(directory)}
        # Row n tells of the step taken when n - 1 had been taken; at weight 0 nothing is aligned.
        on = {2: (0.25, True), 3: (0.5, True), 4: (0.25, True)}
        assert found == {1: (0.0, False), **on, 5: (0.0, False), 6: (0.0, False)}

    def test_measurements_stand_in_their_own_rows(self, cache, fresh):
        directory = run_to_end(make_run(**{"evaluate.every": 2}), fresh(), cache, log_every=3)
        metric = "frechet:efficientnet_lite0@16/ode2"
        assert [(row["step"], metric in row) for row in directory.rows()] == [
            (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True),
        ]  # fmt: skip
        measured = next(row for row in directory.rows() if metric in row)
        known = {"step", "images", "seconds", metric, "heldout/cka", "heldout/cosine", "heldout/gap"}
        costs = {
            "cost/evaluation_seconds",
            "cost/encoder_seconds",
            "cost/train_flops",
            "cost/encoder_flops",
            "cost/evaluation_flops",
        }
        assert measured.keys() == known | costs
        assert sorted(directory.sample_grids()) == [2, 4, 5]
        assert checkpoints.steps(directory.checkpoints) == [4, 5]
        seconds = [row["seconds"] for row in directory.rows()]
        assert seconds == sorted(seconds)

    def test_a_baseline_is_measured_with_the_encoder_it_is_given(self, cache, fresh):
        encoder = {"name": "efficientnet_lite0", "image_size": 32}
        directory = run_to_end(make_run(**OFF, **{"evaluate.encoder": encoder}), fresh(), cache)
        measured = directory.rows()[-1]
        assert -1 < measured["heldout/cka"] <= 1
        assert "heldout/cosine" not in measured  # there is no projector to have one

    @pytest.mark.parametrize("settings, there", [
        ({}, True),
        ({"evaluate.block_index": 1}, True),  # what the family suggests for training
        ({"evaluate.block_index": 2}, False),
        ({"regularizer.block_index": 2, "evaluate.block_index": 2}, True),
        ({"evaluate.encoder": {"name": "efficientnet_lite0", "image_size": 32, "standardize": True}}, False),
    ])  # fmt: skip
    def test_the_projector_is_asked_about_its_own_tap_and_encoder_only(self, cache, settings, there):
        (measured,), _ = Trainer(make_run(**settings), make_options(), cache).measure()
        assert ("heldout/cosine" in measured) == there


class TestMeasuring:
    def test_averaged_weights_are_measured_and_training_goes_on_with_its_own(self, cache, monkeypatch):
        trainer = Trainer(make_run(**{"train.ema": 0.5}), make_options(), cache)
        batches = trainer.batches()
        for _ in range(2):
            trainer.step(next(batches))
        parameter = trainer.state.denoiser.final_layer.linear.weight
        live, average = (
            parameter.detach().clone(),
            trainer.state.ema.average["denoiser.final_layer.linear.weight"].clone(),
        )
        assert not torch.equal(live, average)
        seen: list[torch.Tensor] = []
        draw = FieldSampler.draw

        def watching(self, index):
            assert not self.denoiser.training
            seen.append(parameter.detach().clone())
            return draw(self, index)

        monkeypatch.setattr(FieldSampler, "draw", watching)
        trainer.measure()
        assert torch.equal(seen[0], average)
        assert torch.equal(parameter, live)
        assert trainer.state.denoiser.training

    def test_measuring_often_trains_alike(self, trained):
        assert_same(weights(trained(**{"evaluate.every": 2})), weights(trained()))

    def test_a_run_is_a_function_of_its_seed(self, cache, trained, fresh):
        ended = [trained(), *(run_steps(make_run(seed), fresh(f"{seed}"), cache) for seed in (0, 1))]
        assert_same(weights(ended[0]), weights(ended[1]))
        assert rows(ended[0]) == rows(ended[1])
        assert rows(ended[0])[0]["loss/total"] != rows(ended[2])[0]["loss/total"]


class TestResuming:
    @pytest.fixture(scope="class")
    def whole(self, cache, tmp_path_factory) -> RunDirectory:
        """The run, uninterrupted."""
        return run_to_end(make_run(**RESUMED), RunDirectory(tmp_path_factory.mktemp("whole")), cache, **OFTEN)

    def test_a_run_that_stopped_at_a_measurement_ends_as_an_uninterrupted_one(self, whole, cache, fresh):
        directory = run_steps(make_run(**RESUMED), fresh(), cache, 6, **OFTEN)
        assert directory.state.step == checkpoints.latest(directory.checkpoints)[0] == 6
        run_to_end(make_run(**RESUMED), directory, cache, **OFTEN)
        assert_same(weights(directory), weights(whole))
        assert rows(directory) == rows(whole)
        assert [event["event"] for event in directory.events()] == [
            "running",
            "interrupted",
            "resumed",
            "running",
            "done",
        ]

    def test_stopping_after_every_step_changes_nothing(self, whole, cache, fresh):
        directory = fresh()
        for _ in range(8):
            run_steps(make_run(**RESUMED), directory, cache, 1, **OFTEN)
        run_to_end(make_run(**RESUMED), directory, cache, **OFTEN)
        assert_same(weights(directory), weights(whole))
        assert rows(directory) == rows(whole)

    @pytest.mark.parametrize("lost", [1, 2], ids=["the last", "all"])
    def test_damaged_checkpoints_are_passed_over(self, whole, cache, fresh, lost):
        directory = run_steps(make_run(**RESUMED), fresh(), cache, 5, **OFTEN)
        kept = checkpoints.steps(directory.checkpoints)
        assert kept == [3, 5]
        for step in kept[-lost:]:
            path = directory.checkpoints / f"step-{step:08d}" / "optimizer.safetensors"
            path.write_bytes(path.read_bytes()[:-1])
        run_to_end(make_run(**RESUMED), directory, cache, **OFTEN)
        assert_same(weights(directory), weights(whole))
        assert rows(directory) == rows(whole)

    def test_a_finished_run_is_not_trained_again(self, whole, cache):
        before = {
            path: path.stat().st_mtime_ns for path in whole.path.rglob("*") if path.is_file() and path.name != ".lock"
        }
        assert train(make_run(**RESUMED), whole, make_options(), cache) is State.DONE
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_a_pruned_run_stays_pruned(self, cache, fresh):
        directory = fresh()
        assert (
            train(make_run(), directory, make_options(), cache, should_stop=stop_after(2, State.PRUNED)) is State.PRUNED
        )
        assert train(make_run(), directory, make_options(), cache) is State.PRUNED
        assert directory.state.step == 2

    def test_a_stop_with_the_last_step_comes_too_late(self, cache, fresh):
        assert train(make_run(), fresh(), make_options(), cache, should_stop=stop_after(5)) is State.DONE

    def test_no_pickle_lies_in_a_checkpoint(self, whole):
        for path in whole.checkpoints.rglob("*"):
            if path.is_file():
                assert path.suffix in (".safetensors", ".json")
                if path.suffix == ".json":
                    json.loads(path.read_text())

    def test_a_run_that_is_being_trained_is_left_alone(self, cache, fresh, monkeypatch):
        monkeypatch.setattr(directory_module.RunWriter.__init__, "__defaults__", (0.1,))
        directory = fresh()
        with RunWriter(directory), pytest.raises(directory_module.RunBusyError):
            train(make_run(), directory, make_options(), cache)
        assert directory.rows() == []


class TestFailing:
    def test_a_loss_that_is_no_number_ends_the_run(self, cache, fresh):
        run, directory = make_run(**OFF, **ABSURD), fresh()
        with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step") as caught:
            train(run, directory, make_options(checkpoint_every=1), cache)
        failed_at = int(str(caught.value).split()[-1])
        state = directory.state
        assert (state.state, state.step) == (State.FAILED, failed_at)
        assert (state.error, state.is_diverged) == (f"DivergedError: {caught.value}", True)
        assert all(math.isfinite(value) for row in directory.rows() for value in row.values())
        assert max(checkpoints.steps(directory.checkpoints)) < failed_at
        before = rows(directory)
        with pytest.raises(DivergedError):
            train(run, directory, make_options(checkpoint_every=1), cache)
        assert rows(directory) == before
        assert directory.state.state is State.FAILED

    def test_it_is_noticed_before_measuring(self, cache, fresh):
        directory = fresh()
        with pytest.raises(DivergedError):
            train(make_run(**OFF, **ABSURD), directory, make_options(log_every=100), cache)
        assert directory.rows() == []
        assert checkpoints.steps(directory.checkpoints) == []

    def test_weights_that_blew_up_in_the_last_step_are_not_measured(self, cache, fresh):
        # The loss of step 1 was that of the initial weights, a number; what the step made of them draws no images.
        directory = fresh()
        settings = {**ABSURD, "train.lr": 1e37, "train.steps": 1, "train.ema": 0.0}
        with pytest.raises(DivergedError, match="samples that are not finite"):
            train(make_run(**OFF, **settings), directory, make_options(), cache)
        assert directory.state.state is State.FAILED
        assert [list(row) for row in rows(directory)] == [["step", "images", "loss/total", "loss/denoise"]]
        assert checkpoints.steps(directory.checkpoints) == []

    def test_what_cannot_start_fails_with_its_reason(self, cache, fresh):
        directory = fresh()
        with pytest.raises(RuntimeError, match="sit has 4 blocks"):
            train(make_run(**{"regularizer.block_index": 9}), directory, make_options(), cache)
        assert directory.state.error == "TapError: sit has 4 blocks: block_index must be 0 to 3, got 9"
        assert directory.rows() == []


class TestPrecision:
    @pytest.fixture(scope="class")
    def plain(self, cache) -> dict:
        """What is measured of the initial weights in float32."""
        (row, *_), _ = Trainer(make_run(), make_options(), cache).measure()
        return row

    @pytest.mark.parametrize(
        ("asked", "inside", "has_tf32", "told"),
        [
            ("train", torch.bfloat16, False, "bf16"),
            ("fp32", torch.float32, False, None),
            ("tf32", torch.float32, True, "tf32"),
        ],
    )
    def test_is_measured_in_the_precision_that_is_asked_for(self, cache, plain, asked, inside, has_tf32, told):
        trainer = Trainer(make_run(**{"evaluate.precision": asked}), make_options(precision="bf16"), cache)
        seen = set()
        layer = trainer.state.denoiser.blocks[0].mlp.fc1
        layer.register_forward_hook(
            lambda module, given, out: seen.add((out.dtype, torch.backends.cuda.matmul.allow_tf32))
        )
        (row, *_), _ = trainer.measure()
        assert seen == {(inside, has_tf32)}
        assert {protocol.get("precision") for protocol in trainer.protocols().values()} == {told}
        seen.clear()
        trainer.step(next(trainer.batches()))  # trains as before, with TF32 for what stays float32
        assert seen == {(torch.bfloat16, True)}
        is_single = {name: row[name] == plain[name] for name in plain if name.startswith("heldout")}
        assert len(is_single) == 3 and set(is_single.values()) == {asked != "train"}

    def test_float32_trains_without_tf32(self, cache):
        trainer, seen = Trainer(make_run(), make_options(), cache), []
        layer = trainer.state.denoiser.blocks[0].mlp.fc1
        layer.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
        trainer.step(next(trainer.batches()))
        assert seen == [False]

    def test_bf16_keeps_float32_weights(self, cache, trained, fresh):
        full, half = trained(), trained(options={"precision": "bf16"})
        for name, value in weights(half).items():
            assert value.dtype == torch.float32, name
        losses = [[row["loss/total"] for row in step_rows(directory)] for directory in (full, half)]
        assert all(math.isfinite(loss) for loss in losses[1])
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[1] != losses[0]  # bf16 was on
        # One process trains runs of any precision after one another.
        assert_same(weights(run_steps(make_run(), fresh("again"), cache)), weights(full))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")
    def test_fp16_resumes_with_its_gradient_scaler(self, cache, fresh):
        options = {"precision": "fp16", "device": "cuda"}
        whole, directory = run_steps(make_run(), fresh("whole"), cache, **options), fresh()
        for _ in range(2):
            run_steps(make_run(), directory, cache, 2, **options)
        assert all(value.dtype == torch.float32 for value in weights(whole).values())
        states = [checkpoints.latest(one.checkpoints)[1] / "state.json" for one in (whole, directory)]
        scalers = [json.loads(path.read_text())["scaler"] for path in states]
        assert scalers[0] == scalers[1]
        assert scalers[0]["scale"] > 0

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize(
        "options, match",
        [
            ({"precision": "fp16", "device": "auto"}, "fp16 needs a GPU"),
            ({"device": "cuda"}, "torch sees no GPU on this machine"),
        ],
    )
    def test_what_the_machine_cannot_do_is_refused(self, cache, fresh, options, match):
        # accelerate would train in float32, and on the CPU, without a word.
        directory = fresh()
        with pytest.raises(DeviceError, match=match):
            train(make_run(), directory, make_options(**options), cache)
        assert directory.state.state is State.FAILED


@pytest.mark.parametrize("family", [{"regularizer.type": "repa"}, {**UNET, **UREPA}], ids=["sit", "unet"])
def test_an_image_folder_in_latents(family, tmp_path, fresh):
    for i in range(12):
        path = tmp_path / "images" / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, (36, 40)).save(path)
    save_vae(tmp_path / "vae")
    data = {"source": "imagefolder", "path": str(tmp_path / "images"), "resolution": 32, "holdout": 4}
    settings = {"data": {**data, "vae": str(tmp_path / "vae")}, "train.steps": 2}
    directory = run_to_end(make_run(**settings, **family), fresh(), tmp_path / "cache")
    found = directory.rows()
    assert [row["step"] for row in found] == [1, 2, 2]
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert (
        weights(directory)[
            "denoiser:y_embedder.weight" if "model.family" not in family else "denoiser:net.class_embedding.weight"
        ].shape[0]
        == 4
    )
    assert -1 <= found[-1]["heldout/cosine"] <= 1


@pytest.mark.parametrize("settings", [{}, {**UNET, **UREPA}, {**SIT_DOWN, **UREPA}], ids=["sit", "unet", "sit_down"])
def test_training_learns(settings, cache, fresh):
    run = make_run(**settings, **{"train.steps": 41, "train.batch_size": 32})
    found = step_rows(run_steps(run, fresh(), cache, steps=40))

    def mean(name: str, part: slice) -> float:
        values = [row[name] for row in found[part]]
        return sum(values) / len(values)

    assert mean("loss/denoise", slice(-5, None)) < 0.8 * mean("loss/denoise", slice(0, 5))
    assert mean("align/cosine", slice(-5, None)) > mean("align/cosine", slice(0, 5)) + 0.1


def test_what_is_left_out_of_the_data_is_in_the_history_of_the_run(tmp_path):
    for number in range(5):
        noise_image(number, (8, 8)).save(tmp_path / f"{number}.png")
    listed = [json.dumps({"file_name": f"{number}.png", "text": "x"}) for number in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(listed))
    data = {"source": "imagefolder", "path": str(tmp_path), "resolution": 8, "holdout": 1}
    run = make_run(**OFF, data=data, **{"train.steps": 2, "train.batch_size": 2})
    directory = run_steps(run, RunDirectory(tmp_path / "runs" / run.run_id), tmp_path / "cache", steps=1)
    notes = [event["notes"] for event in directory.events() if event["event"] == "data"]
    assert notes == [["1 of 5 images have no row in metadata.jsonl and are left out"]]
