"""What a plan still takes: from what was measured, else from counted FLOPs; and the refusal of what is too much."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path

import pytest

from repa_lab.orchestration.api import sweep as carry_out
from repa_lab.orchestration.cost import (
    UTILISATION,
    assumed_device,
    estimate,
    require_budget,
    rounded,
    seconds_per_image,
)
from repa_lab.orchestration.display import arm_rows, as_json, sentences, short
from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot, RunWriter, State, files
from repa_lab.runs.root import ArmRecord
from repa_lab.spec import Machine, RunOptions, SpecError, load_spec
from repa_lab.training.costs import measurements
from tests.data.conftest import noise_image
from tests.orchestration.test_costs import DIGITS, REPA, cost, spec_of


def write_run(root, run, rows, state=State.DONE, machine=None, **options):
    """A run's directory as a finished run leaves it."""
    directory = RunsRoot(root).run(run.run_id)
    made = {"platform": platform.platform(), "cpus": os.cpu_count(), "processes": 1}
    with RunWriter(directory) as writer:
        shown = {**RunOptions(device="cpu").resolved(Machine()).model_dump(mode="json"), **options}
        writer.describe(run.to_json(), {**made, "options": shown, **(machine or {})})
        for row in rows:
            writer.row(row)
        writer.state(state, rows[-1]["step"])
    return directory


def row(step, seconds, batch=8):
    return {"step": step, "images": step * batch, "seconds": seconds, "loss/total": 1.0}


class TestSpeed:
    def test_seconds_leave_out_the_first_logged_steps(self):
        assert seconds_per_image([row(2, 9.0), row(6, 10.0), row(10, 11.0)]) == pytest.approx(2 / 64)
        assert seconds_per_image([row(5, 2.0)]) == pytest.approx(2 / 40)
        assert seconds_per_image([]) is None

    def test_measured_seconds_are_those_of_runs_of_the_same_kind(self, tmp_path):
        spec = spec_of(DIGITS, seeds=2)
        run = make_plan(spec, RunsRoot(tmp_path)).runs[0].run
        write_run(tmp_path, run, [row(5, 10.0), row(10, 14.0)])
        found = estimate(make_plan(spec, RunsRoot(tmp_path)))
        speed = found.speeds["all"]
        assert (speed.image, speed.runs) == (pytest.approx(0.1), 1)
        evaluations = 2 * found.costs["all"].evaluation_flops / (found.costs["all"].image_flops / 0.1)
        assert found.total.runs == 1
        assert found.total.gpu_hours == pytest.approx((80 * 0.1 + evaluations) / 3600)
        assert any(note == "1 of 1 arms: as measured here on 1 run, 10 images/s" for note in found.notes)

    def test_evaluations_are_what_an_unbroken_run_spent_beside_training(self, tmp_path):
        spec = spec_of(DIGITS, seeds=2)
        run = make_plan(spec, RunsRoot(tmp_path)).runs[0].run
        measures = [
            {"step": 5, "images": 40, "seconds": 10.0, "fid": 1.0},
            {"step": 10, "images": 80, "seconds": 14.0, "fid": 1.0},
        ]
        directory = write_run(tmp_path, run, [row(5, 10.0), measures[0], row(10, 14.0), measures[1]])
        events = [{"time": 100.0, "event": "running", "step": 0}, {"time": 120.0, "event": "done", "step": 10}]
        files.rewrite_rows(directory.path / "events.jsonl", events)
        speed = estimate(make_plan(spec, RunsRoot(tmp_path))).speeds["all"]
        assert (speed.evaluation, speed.is_evaluation_measured) == (pytest.approx((20 - 14) / 2), True)

    def test_dear_measurements_are_told_from_usual_ones(self, tmp_path):
        """25 times the samples' FLOPs at the end: of 54 s beside training the usual two took 2 s each."""
        spec = spec_of(DIGITS, {"evaluate.full": {"samples": 80, "sampler": {"type": "sde", "steps": 250}}}, seeds=2)
        run = make_plan(spec, RunsRoot(tmp_path)).runs[0].run
        measures = [
            {"step": step, "images": 8 * step, "seconds": 14.0, name: 1.0}
            for step, name in ((5, "fid"), (10, "fid"), (10, "full"))
        ]
        directory = write_run(tmp_path, run, [row(5, 10.0), measures[0], row(10, 14.0), *measures[1:]])
        events = [{"time": 100.0, "event": "running", "step": 0}, {"time": 168.0, "event": "done", "step": 10}]
        files.rewrite_rows(directory.path / "events.jsonl", events)
        found = estimate(make_plan(spec, RunsRoot(tmp_path)))
        speed = found.speeds["all"]
        assert (speed.evaluation, speed.is_evaluation_measured) == (pytest.approx(54 / 27), True)
        # The run that is left takes as long: 80 images of 0.1 s, and the same measurements.
        assert found.total.gpu_hours == pytest.approx((80 * 0.1 + 54) / 3600)

    @pytest.mark.parametrize(
        "other",
        [{"machine": {"cpus": 999}}, {"machine": {"gpus": ["NVIDIA T4"]}}, {"precision": "bf16"}, {"compile": True}],
    )
    def test_other_machines_and_other_options_say_nothing(self, tmp_path, other):
        spec = spec_of(DIGITS, seeds=2)
        write_run(tmp_path, make_plan(spec, RunsRoot(tmp_path)).runs[0].run, [row(5, 10.0), row(10, 14.0)], **other)
        assert estimate(make_plan(spec, RunsRoot(tmp_path))).speeds["all"].runs == 0

    def test_runs_of_other_sweeps_count(self, tmp_path):
        longer = spec_of(DIGITS, {"train.steps": 10, "train.lr": 0.5})
        write_run(tmp_path, make_plan(longer, RunsRoot(tmp_path)).runs[0].run, [row(5, 10.0), row(10, 14.0)])
        assert estimate(make_plan(spec_of(DIGITS), RunsRoot(tmp_path))).speeds["all"].runs == 1
        wider = spec_of(DIGITS, {"train.batch_size": 16})
        assert estimate(make_plan(wider, RunsRoot(tmp_path))).speeds["all"].runs == 0

    def test_without_a_run_it_is_flops_over_a_stated_share_of_the_peak(self, tmp_path):
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "information").write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ: 1\n")
        device, reason = assumed_device(RunOptions(), tmp_path)
        assert (device.name, device.peak("bf16"), device.peak("fp32"), reason) == ("an A100", 312e12, 19.5e12, "")
        device, reason = assumed_device(RunOptions(), tmp_path / "nothing")
        assert (device.name, device.peak("fp16")) == ("an H100", 989e12) and reason.startswith("there is no GPU here")
        assert assumed_device(RunOptions(device="cpu"))[0].name == f"{os.cpu_count()} CPU cores"

    def test_the_papers_run_takes_the_hours_of_its_flops(self, monkeypatch):
        """REPA XL/2, 400K steps: at 13.5 % of 8 H100s the published 20.6 h are 165 GPU hours (papers.md, section 7)."""
        monkeypatch.setattr("repa_lab.orchestration.cost.UTILISATION", 0.135)
        options = RunOptions(precision="bf16")
        assert assumed_device(options, Path("nowhere"))[0].peak("bf16") == 989e12
        settings = {
            "model.size": "XL/2",
            "train.steps": 400_000,
            "regularizer.encoder.cache": False,
            "run.device": "auto",
        }
        found = estimate(
            make_plan(
                spec_of(REPA, {**settings, "evaluate.every": 400_000, "evaluate.samples": 16}),
                RunsRoot(Path("nowhere")),
            )
        )
        assert found.total.gpu_hours == pytest.approx(165, rel=0.02)


class TestTotals:
    def test_a_run_that_two_arms_ask_for_counts_once(self, tmp_path):
        arms = {"axes": {"train.lr": [0.1, 0.2]}, "include": [{"label": "again", "set": {"train.lr": 0.1}}]}
        found = estimate(make_plan(spec_of(DIGITS, **arms), RunsRoot(tmp_path)))
        assert (len(found.shares), found.total.runs, found.total.images) == (2, 2, 160)

    @pytest.mark.parametrize(
        ("begun", "end", "counted"),
        [
            (0, 120, (3, 1)),
            (0, 100, (2, 1)),
            (50, 100, (1, 1)),
            (100, 120, (1, 0)),
            (49, 50, (1, 0)),
            (120, 120, (0, 0)),
        ],
    )
    def test_measurements_are_counted_as_the_loop_makes_them(self, begun, end, counted):
        config = spec_of(REPA, {"train.steps": 120, "evaluate.full": {"at": [100]}}).arms[0].config
        assert measurements(config, begun, end) == counted

    def test_a_milestone_costs_what_its_protocol_takes(self):
        full = {"evaluate.full": {"samples": 80, "sampler": {"type": "sde", "steps": 250}}}
        found = cost(full, DIGITS)
        assert found.milestone_flops / found.evaluation_flops == pytest.approx(5 * 5)
        config = spec_of(DIGITS, full).arms[0].config
        assert found.measuring(config, 0, 10) == 2 * found.evaluation_flops + found.milestone_flops

    def test_a_beginning_that_is_shared_counts_once(self, tmp_path):
        aligned = {
            **DIGITS,
            "regularizer": {**REPA["regularizer"], "encoder": {"name": "efficientnet_lite0", "image_size": 32}},
        }
        axes = {"regularizer.schedule.cutoff_step": [0, 4]}
        shared, alone = (
            estimate(make_plan(spec_of(aligned, {"run.share": share}, axes=axes), RunsRoot(tmp_path)))
            for share in (True, False)
        )
        assert (alone.total.steps, shared.total.steps) == (20, 16)
        assert (alone.total.images, shared.total.images) == (160, 128)
        assert shared.total.gpu_hours < alone.total.gpu_hours
        assert shared.total.disk_bytes == alone.total.disk_bytes

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (0.012345, "0.0123"), (999.7, "1,000"), (1689.7, "1,690"), (12_345_678, "12,300,000")],
    )
    def test_numbers_are_told_in_three_digits_and_written_out(self, value, text):
        assert rounded(value) == text

    def test_a_search_counts_its_trials(self, tmp_path):
        search = {"space": {"train.lr": {"log": [0.1, 0.2]}}, "trials": 7}
        found = estimate(make_plan(spec_of(DIGITS, search=search, seeds=2), RunsRoot(tmp_path)))
        assert (found.total.runs, found.total.steps) == (14, 140)

    def test_runs_of_the_arm_itself_are_no_trials_of_a_search(self, tmp_path):
        search = {"space": {"train.lr": {"log": [0.1, 0.2]}}, "trials": 7}
        spec = spec_of(DIGITS, search=search, seeds=2)
        for entry in make_plan(spec, RunsRoot(tmp_path)).runs:
            with RunWriter(RunsRoot(tmp_path).run(entry.run.run_id)) as writer:
                writer.state(State.DONE, 10)
        assert estimate(make_plan(spec, RunsRoot(tmp_path))).total.runs == 14

    def test_of_a_search_what_ended_is_deducted_and_what_it_does_not_change_counts_once(self, tmp_path):
        encoder = {"name": "efficientnet_lite0", "image_size": 32}
        arms = {
            "baseline": {"regularizer.type": "none"},
            "aligned": {"regularizer": {"type": "repa", "encoder": encoder}},
        }
        search = {"space": {"regularizer.weight": {"log": [0.1, 0.2]}}, "trials": 7}
        spec = spec_of(DIGITS, {"name": "mine"}, axes={"a": arms}, search=search, seeds=2)
        plan = make_plan(spec, RunsRoot(tmp_path))
        found = estimate(plan)
        assert (found.total.runs, found.trials) == (7 * 2 + 2, {"aligned": 7})
        directory = plan.root.sweep("mine")
        directory.path.mkdir()
        runs = [{"seed": seed, "run_id": f"{seed:012x}"} for seed in (0, 1)]
        directory.record(plan.manifest([ArmRecord(label="aligned, weight=0.1", levels={"a": "aligned"}, runs=runs)]))
        with RunWriter(plan.root.run(runs[0]["run_id"])) as writer:
            writer.state(State.PRUNED, 4)
        again = estimate(plan)
        assert again.total.runs == 7 * 2 - 1 + 2
        assert [(row["arm"], row["runs"], row["steps left"]) for row in arm_rows(again)] == [
            ("baseline", "2 new", "20"),
            ("aligned", "13 at most", "130"),
        ]

    def test_caches_count_once_and_not_once_a_run_has_begun(self, tmp_path):
        for number in range(6):
            noise_image(number).save(tmp_path / f"{number}.png")
        overrides = {"data.path": str(tmp_path), "data.flip": True, "data.holdout": 4}
        spec = spec_of(REPA, overrides, axes={"regularizer.weight": [0.1, 0.2]})
        plan = make_plan(spec, RunsRoot(tmp_path / "runs"))
        latents, features = estimate(plan).caches
        assert (latents.images, latents.disk_bytes_left, features.disk_bytes_left) == (
            12,
            12 * 32 * 1024,
            12 * 384 * 1024,
        )
        alone = sum(share.gpu_hours for share in estimate(plan).shares.values())
        assert estimate(plan).total.gpu_hours == pytest.approx(alone + latents.gpu_hours_left + features.gpu_hours_left)
        with RunWriter(plan.root.run(plan.runs[0].run.run_id)) as writer:
            writer.state(State.INTERRUPTED, 3)
        again = estimate(make_plan(spec, plan.root)).caches
        assert [(one.begun, one.gpu_hours_left, one.disk_bytes_left) for one in again] == [(True, 0, 0)] * 2

    def test_caches_that_take_more_than_they_save_are_told_as_such(self, tmp_path):
        def told(steps: int) -> str:
            found = estimate(
                make_plan(
                    spec_of(
                        REPA, {"data.path": str(tmp_path), "data.holdout": 4}, train={"steps": steps, "batch_size": 1}
                    ),
                    RunsRoot(tmp_path / "runs"),
                )
            )
            assert (found.total.saved_hours < 0) == (steps == 1)
            (line,) = (
                line for line in sentences(found) if "caches " in line and "GPU h" in line and "images x" not in line
            )
            return line

        for number in range(6):
            noise_image(number).save(tmp_path / f"{number}.png")
        assert re.fullmatch(r"filling the caches takes [\d.e-]+ GPU h more than they save in so few steps", told(1))
        assert re.fullmatch(
            r"caches save [\d.e-]+ GPU h of encoding in every step, their own filling deducted", told(1000)
        )

    def test_the_json_has_what_it_has_always_had(self, tmp_path):
        found = as_json(estimate(make_plan(spec_of(DIGITS), RunsRoot(tmp_path))))
        json.dumps(found, allow_nan=False)
        assert set(found) == {
            "name",
            "question",
            "runs",
            "arms",
            "blocked",
            "steps",
            "orphaned",
            "caches",
            "total",
            "budget",
            "assumed",
            "notes",
        }
        known = {"arm", "seed", "run_id", "state", "steps", "steps_left", "blocked"}
        assert set(found["runs"][0]) == known | {
            "reason",
            "from_step",
            "images_left",
            "flops_left",
            "gpu_hours_left",
            "disk_bytes_left",
        }
        assert found["assumed"]["utilisation"] == UTILISATION

    @pytest.mark.parametrize(
        ("number", "text"), [(0, "0"), (999, "999"), (1234, "1.23 K"), (2.5e6, "2.5 M"), (7.25e20, "725 E")]
    )
    def test_large_numbers_in_three_digits(self, number, text):
        assert short(number) == text
        assert short(4.1e12, "FLOPs") == "4.1 TFLOPs"


class TestBudget:
    def test_what_is_left_must_fit(self, tmp_path):
        spec = tmp_path / "question.yaml"
        spec.write_text(json.dumps(DIGITS).removesuffix("}") + ',\n "budget": {"gpu_hours": 1e-6, "disk_gib": 1000}}')
        with pytest.raises(SpecError) as refused:
            carry_out(spec, tmp_path / "runs")
        (problem,) = refused.value.problems
        assert str(refused.value).startswith(f"{spec}:2:")
        assert (problem.path, problem.place.line) == ("budget.gpu_hours", 2)
        hours = estimate(make_plan(load_spec(spec), RunsRoot(tmp_path / "runs"))).total.gpu_hours
        assert problem.message.startswith(
            f"what is left takes about {hours:,.3g} GPU hours, the budget is 1e-06: allow it with --set budget.gpu_hours="
        )
        assert not (tmp_path / "runs").exists()

    def test_the_advice_suffices(self, tmp_path):
        for name in ("gpu_hours", "disk_gib"):
            plan = make_plan(spec_of(DIGITS, budget={name: 0}), RunsRoot(tmp_path))
            with pytest.raises(SpecError) as refused:
                require_budget(plan)
            advised = float(refused.value.problems[0].message.split("=")[1].split(",")[0])
            require_budget(make_plan(spec_of(DIGITS, budget={name: advised}), RunsRoot(tmp_path)))

    def test_what_is_done_takes_nothing(self, tmp_path):
        spec = spec_of(DIGITS, budget={"gpu_hours": 0, "disk_gib": 0})
        write_run(tmp_path, make_plan(spec, RunsRoot(tmp_path)).runs[0].run, [row(10, 1.0)])
        require_budget(make_plan(spec, RunsRoot(tmp_path)))


def test_a_plan_says_what_is_left_out_of_a_folder(tmp_path):
    for number in range(4):
        noise_image(number).save(tmp_path / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(("a cat", "", "a dog"))]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "again").symlink_to(tmp_path)
    data = {"source": "imagefolder", "path": str(tmp_path), "resolution": 32, "holdout": 1}
    found = estimate(make_plan(spec_of(DIGITS, data=data), RunsRoot(tmp_path / "runs")))
    expected = [
        f"1 folder is reached twice through links and read once ('{tmp_path}/again' is left out)",
        "1 of 4 images have no row in metadata.jsonl and are left out",
        "1 of 3 images have no caption: they are trained with the empty one",
    ]
    assert found.notes[1:4] == expected == as_json(found)["notes"][1:4]  # after the warning of a short average
    assert set(expected) <= set(sentences(found))
