from __future__ import annotations

import math

import pytest

from repa_lab.report import answer
from repa_lab.report.results import load_results
from repa_lab.report.tables import decimals, p_value, significant
from repa_lab.report.text import exclusions, incomplete, lead, methods
from repa_lab.runs import RunsRoot, State, SweepDirectory, files

from .conftest import METRIC, STEPS, Build, FakeArm, FakeRun, constant_runs


def said(sweep: SweepDirectory) -> list[str]:
    return answer(load_results(sweep.path))


def pair(build: Build, arm: list[float], baseline: list[float], **extra: str) -> list[str]:
    arms = [FakeArm("base", constant_runs(baseline)), FakeArm("arm", constant_runs(arm), "base")]
    return said(build(arms, **extra))


def test_a_resolved_difference_in_full(build: Build) -> None:
    (line,) = pair(build, [221.0, 224.0, 227.0], [244.0, 246.0, 248.0])
    # differences -23, -22, -21: mean -22, half width 2.484
    assert line == (
        f"arm: {METRIC} at step 600 is 224.0 against 246.0 of base: -22.0 (-8.9 %), 95 % interval of the paired "
        "difference [-24.5, -19.5], n = 3 seeds: lower, which is better; resolved. It reached the baseline's final value "
        "at step 100, at 1.00x the baseline's speed, 95 % interval of the ratio [1.00, 1.00], not resolved as it contains 1 "
        "(3 of 3 seeds). In 3 of 3 seeds the arm or the baseline was there at its first measurement, so how much sooner "
        "is not known."
    )


def test_direction_follows_the_goal(build: Build) -> None:
    (line,) = pair(build, [1.0, 1.1, 1.2], [2.0, 2.1, 2.3], goal="max")
    assert "lower, which is worse; resolved" in line
    assert "It did not reach the baseline's final value (0 of 3 seeds)." in line


def test_an_interval_with_0_is_not_resolved(build: Build) -> None:
    (line,) = pair(build, [10.0, 20.0, 30.0], [12.0, 19.0, 31.0])
    assert "n = 3 seeds: not resolved, the interval contains 0." in line


def test_two_seeds_have_an_interval_and_no_verdict(build: Build) -> None:
    (line,) = pair(build, [1.0, 2.0], [2.0, 3.0])
    assert (
        "95 % interval of the paired difference [-1.000, -1.000], n = 2 seeds: insufficient, two seeds are too few to conclude."
        in line
    )
    assert "resolved" not in line


def test_one_seed_has_no_interval(build: Build) -> None:
    (line,) = pair(build, [1.0], [2.0])
    assert "-1.000 (-50.0 %), n = 1 seed: insufficient, one seed has no interval and is too few to conclude." in line
    assert "interval of" not in line


def test_a_small_difference_is_not_rounded_away(build: Build) -> None:
    (line,) = pair(build, [224.001, 224.002, 224.003], [224.0, 224.0, 224.0])
    assert "+0.0020" in line


def test_sooner_with_seeds_that_never_got_there(build: Build) -> None:
    base = [FakeRun(seed, {100: 20.0, 200: 10.0}) for seed in range(3)]
    arm = [FakeRun(0, {100: 10.0, 200: 5.0}), FakeRun(1, {100: 15.0, 200: 5.0}), FakeRun(2, {100: 30.0, 200: 15.0})]
    (line,) = said(build([FakeArm("base", base), FakeArm("arm", arm, "base")]))
    assert "at step 125, 1.63x sooner, 95 % interval of the ratio [0.12, 21.46]" in line
    assert "(2 of 3 seeds; the other seeds did not, so this is optimistic)" in line


def test_the_step_says_when_it_is_not_the_last(build: Build) -> None:
    short = [FakeRun(0, {100: 2.0, 200: 1.0}, State.FAILED, "ValueError: no")]
    lines = said(build([FakeArm("base", constant_runs([2.0])), FakeArm("arm", short, "base")]))
    assert "at step 200 of 600 (the last step that all its measured runs and those of its baseline have)" in lines[0]
    assert lines[1] == "Incomplete: arm: seed 0 failed at step 200 (ValueError: no)."


def test_seeds_left_out_are_counted(build: Build) -> None:
    diverged = FakeRun(1, {**dict.fromkeys(STEPS, 1.0), 600: math.nan})
    arms = [
        FakeArm("base", constant_runs([2.0, 2.0, 2.0])),
        FakeArm("arm", [*constant_runs([1.0]), diverged, 2], "base"),
    ]
    lines = said(build(arms))
    assert "n = 1 seed" in lines[0]
    assert "Left out: 2 of 3 seeds, without a finite value in both arms." in lines[0]
    assert lines[1] == "Incomplete: arm: seed 2 has not started."


def test_nothing_finite(build: Build) -> None:
    runs = [FakeRun(0, dict.fromkeys(STEPS, math.nan))]
    lines = said(build([FakeArm("base", constant_runs([1.0])), FakeArm("arm", runs, "base")]))
    assert lines == [f"arm: no seed has a finite {METRIC} at step 600 in both the arm and base; nothing to compare."]


def test_nothing_measured_yet(build: Build) -> None:
    lines = said(build([FakeArm("base", [0]), FakeArm("arm", [0], "base")]))
    assert lines[0] == "arm: no evaluation yet that all its measured runs and those of base share; nothing to compare."
    assert lines[1:] == ["Incomplete: base: seed 0 has not started.", "Incomplete: arm: seed 0 has not started."]


def test_different_protocols_are_not_compared(build: Build) -> None:
    other = "fid:inception@10000/sde250"
    arms = [FakeArm("base", constant_runs([2.0] * 3)), FakeArm("arm", constant_runs([1.0] * 3, metric=other), "base")]
    warning, line = said(build(arms))
    assert warning.startswith(f"The arms were not all measured alike ({METRIC} for base; {other} for arm).")
    assert f"cannot be compared with base: it was measured as {other}, the baseline as {METRIC}" in line
    assert "against" not in line


def test_a_pair_with_its_own_protocol_is_compared_within(build: Build) -> None:
    other = "frechet:efficientnet_lite0@100/sde50"
    arms = [
        FakeArm("ode, base", constant_runs([2.0] * 3)),
        FakeArm("ode, arm", constant_runs([1.0, 1.1, 1.2]), "ode, base"),
        FakeArm("sde, base", constant_runs([3.0] * 3, metric=other)),
        FakeArm("sde, arm", constant_runs([1.0, 1.1, 1.2], metric=other), "sde, base"),
    ]
    warning, ode, sde = said(build(arms))
    assert "cannot be compared" in warning
    assert METRIC in ode
    assert f"{other} at step 600 is 1.100 against 3.000 of sde, base" in sde


def test_what_is_compared_with_nothing_is_said_with_its_reason(build: Build) -> None:
    odd = FakeArm("odd", constant_runs([3.0]), unmatched="'a', 'b' are equally near: they share none of its levels")
    arms = [FakeArm("a", constant_runs([2.0])), FakeArm("b", constant_runs([2.0]), "a"), odd]
    assert said(build(arms))[-1] == f"odd: compared with nothing, because {odd.unmatched}."
    none = "no arm has compare.baseline {}"
    lines = said(build([FakeArm("a", [0], unmatched=none), FakeArm("b", [0], unmatched=none)], name="none"))
    assert lines[0] == f"No arm has a matched baseline, so nothing is compared: {none}."


def test_a_sweep_without_a_baseline_claims_nothing(build: Build) -> None:
    lines = said(
        build([FakeArm("a", constant_runs([1.0, 2.0, 3.0])), FakeArm("b", constant_runs([2.0])), FakeArm("c", [0])])
    )
    assert lines[0] == "No arm has a matched baseline, so nothing is compared."
    assert lines[1] == f"a: {METRIC} at step 600 is 2.000, 95 % interval [-0.484, 4.484], n = 3 seeds."
    assert lines[2] == f"b: {METRIC} at step 600 is 2.000, n = 1 seed."
    assert lines[3] == "c: nothing measured yet."


def test_the_same_run_is_no_comparison(build: Build) -> None:
    shared = [FakeRun(0, dict.fromkeys(STEPS, 1.0), run_id="shared")]
    (line,) = said(build([FakeArm("off", shared), FakeArm("weight=0", shared, "off")]))
    assert line == "weight=0: the same run as off, setting for setting, so there is no difference to measure."


def test_pruned_runs_are_not_incomplete(build: Build) -> None:
    results = load_results(build([FakeArm("a", [FakeRun(0, {100: 1.0}, State.PRUNED)])]).path)
    assert incomplete(results) == []


def test_several_sweeps_name_themselves(build: Build, root: RunsRoot) -> None:
    for name in ("one", "two"):
        build([FakeArm("a", constant_runs([1.0]))], name=name)
    assert {line.split(":")[0] for line in answer(load_results(root.path))} == {"one", "two"}


def search(*trials: tuple[str, str, float | None], goal: str = "min") -> dict[str, object]:
    rows = [
        {"arm": arm, "state": state, "value": value, "params": {"regularizer.weight": 0.5}}
        for arm, state, value in trials
    ]
    return {"metric": METRIC, "goal": goal, "trials": rows}


def searched(build: Build, **recorded: object) -> SweepDirectory:
    arms = [FakeArm("base", constant_runs([3.0] * 3))]
    arms += [FakeArm(f"t{trial}", constant_runs([3.0 - trial, 3.1 - trial, 3.2 - trial]), "base") for trial in range(3)]
    return build(arms, **recorded)


def test_a_search_speaks_of_its_best_trial_only_and_of_its_luck(build: Build) -> None:
    sweep = searched(build, search=search(("t0", "complete", 3.1), ("t1", "complete", 2.1), ("t2", "pruned", 1.1)))
    best, comparison = said(sweep)
    assert best.startswith(f"Best of 2 completed trials (3 in all): t1, {METRIC} = 2.100.")
    assert "optimistic: confirm it with fresh seeds" in best
    assert comparison.startswith("t1: ")


@pytest.mark.parametrize(("goal", "arm"), [("min", "t1"), ("max", "t0")])
def test_the_best_trial_follows_the_goal(build: Build, goal: str, arm: str) -> None:
    recorded = search(("t0", "complete", 3.1), ("t1", "complete", 2.1), ("t2", "complete", None), goal=goal)
    best = load_results(searched(build, search=recorded).path).best_trial
    assert best is not None
    assert best.arm == arm


def test_a_search_with_several_objectives_names_its_front(build: Build) -> None:
    recorded = search(("t0", "complete", 3.1), ("t1", "complete", 2.1), ("t2", "complete", 1.1))
    recorded["objectives"] = [{"metric": METRIC, "goal": "min"}, {"metric": "gpu_hours", "goal": "min"}]
    (line, *_) = said(searched(build, search={**recorded, "pareto": ["t0", "t2"]}))
    wanted = f"Pareto front of 3 completed trials (3 in all) over {METRIC} (min) and gpu_hours (min): t0; t2."
    assert line.startswith(wanted)


def test_a_search_that_has_just_begun(build: Build) -> None:
    assert said(searched(build, search=search(("t0", "running", None))))[0] == (
        "The search has no completed trial yet (1 begun)."
    )


def test_a_difference_that_chance_explains_among_several_is_not_resolved(build: Build) -> None:
    base, near = FakeArm("base", constant_runs([10.0, 20.0, 30.0])), constant_runs([9.0, 19.5, 29.0])
    sweep = build([base, FakeArm("arm", near, "base"), FakeArm("other", [0], "base")])
    assert "not resolved, chance explains it among 2 comparisons (Holm's p = 0.075)." in said(sweep)[0]


def test_protocols_that_differ_under_one_name_are_named(build: Build) -> None:
    base = FakeArm("base", constant_runs([2.0] * 3, protocol={"reference": "train"}))
    arm = FakeArm("arm", constant_runs([1.0] * 3, protocol={"reference": "val"}), "base")
    sweep = build([base, arm])
    reason = f"under the name {METRIC} their runs were measured differently: reference (val / train)"
    assert said(sweep) == [f"arm: cannot be compared with base: {reason}."]
    (line,) = exclusions(load_results(sweep.path))
    assert line.startswith(
        f"arm: {METRIC} is not compared with base, because under this one name runs were measured differently"
    )


# ---- the answer in one sentence


def test_the_lead_of_one_arm_is_its_difference(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([244.0, 246.0, 248.0])),
        FakeArm("arm", constant_runs([221.0, 224.0, 227.0]), "base"),
    ]
    assert lead(load_results(build(arms).path)) == (
        f"arm: {METRIC} at step 600 is 224.0 against 246.0 of base: -22.0 (-8.9 %), 95 % interval of the paired difference "
        "[-24.5, -19.5], n = 3 seeds: lower, which is better; resolved."
    )


@pytest.mark.parametrize(("goal", "best"), [("min", "much"), ("max", "worse")])
def test_the_lead_of_several_arms_counts_them_and_shows_the_best(build: Build, goal: str, best: str) -> None:
    arms = [
        FakeArm("base", constant_runs([10.0, 20.0, 30.0])),
        FakeArm("little", constant_runs([9.0, 19.0, 29.01]), "base"),
        FakeArm("much", constant_runs([5.0, 15.0, 25.01]), "base"),
        FakeArm("worse", constant_runs([12.0, 22.0, 32.01]), "base"),
        FakeArm("unclear", constant_runs([1.0, 29.0, 31.0]), "base"),
    ]
    found = lead(load_results(build(arms, goal=goal).path))
    counts = (2, 1) if goal == "min" else (1, 2)
    assert found.startswith(
        f"Of 4 compared arms: {counts[0]} resolved to be better than the baseline, {counts[1]} to be worse."
    )
    assert f": {best}: " in found
    assert ("optimistic" in found) is (goal == "min")


def test_the_lead_says_when_nothing_is_resolved(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([10.0, 20.0])),
        *(FakeArm(f"a{v}", constant_runs([v, v]), "base") for v in (3.0, 2.0)),
    ]
    assert lead(load_results(build(arms).path)).startswith(
        "None of 2 compared arms is resolved to differ from its baseline. The most favourable: a2.0: "
    )


def test_the_lead_without_anything_to_compare(build: Build) -> None:
    assert (
        lead(load_results(build([FakeArm("a", [0])]).path)) == "No arm has a matched baseline, so nothing is compared."
    )


# ---- what was left out


def test_nothing_is_left_out_of_a_whole_sweep(quickstart: SweepDirectory) -> None:
    assert exclusions(load_results(quickstart.path)) == []


def test_everything_that_is_left_out_is_said(build: Build, root: RunsRoot) -> None:
    half = FakeRun(1, {**dict.fromkeys(STEPS[:3], 5.0), 300: math.nan}, State.FAILED, "ValueError: no", run_id="half")
    arms = [
        FakeArm("base", constant_runs([2.0, 2.0, 2.0])),
        FakeArm("arm", [*constant_runs([1.0]), half, 2], "base"),
        FakeArm("large", constant_runs([1.0] * 3, batch_size=128), "base"),
        FakeArm("pruned", [FakeRun(s, {100: 4.0}, State.PRUNED) for s in range(3)]),
    ]
    sweep = build(arms)
    with (root.run("half").path / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    lines = exclusions(load_results(sweep.path))
    assert lines == [
        "arm, seed 1 (run half): metrics.jsonl:8: no step; the line is left out.",
        f"arm: not in the means of {METRIC} at step 300: seed 2 never measured; seed 1 not finite; "
        "measurements after step 300 (up to 600).",
        "large: at step 600 it has seen 76,800 images and base 38,400; the summary compares equal steps, the curves over "
        "images show the rest.",
        "3 of 12 runs were ended early by the search (pruned): they count as far as they got.",
    ]


def test_a_run_whose_state_cannot_be_read_is_incomplete(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("a", [FakeRun(0, {100: 1.0}, run_id="hurt")])])
    (root.run("hurt").path / "state.json").write_text("{")
    assert incomplete(load_results(sweep.path)) == ["a: seed 0 has no readable state; its last row is at step 100."]


def test_numbers_of_any_size() -> None:
    assert [significant(value) for value in (0.0, 0.00353, 12800.0, 1.31e11, 2e-7, math.nan, None)] == [
        *("0", "0.00353", "12,800", "1.31e+11", "2.00e-07", "n/a", "n/a")
    ]
    assert [p_value(p) for p in (0.0004, 0.0123, 0.2, math.nan)] == ["<0.001", "0.012", "0.20", "n/a"]


def test_decimals() -> None:
    assert [decimals(value) for value in (224.1, 0.0123, 12345.0, 0.0, math.nan, 1e-9)] == [1, 5, 0, 3, 3, 6]


def test_one_look_at_each_tells_no_speed(build: Build) -> None:
    arms = [FakeArm("base", [FakeRun(s, {600: 50.0 + s}) for s in range(3)])]
    (line,) = said(build([*arms, FakeArm("arm", [FakeRun(s, {600: 20.0 + s}) for s in range(3)], "base")]))
    assert "resolved. It reached the baseline's final value at step 600, at 1.00x the baseline's speed" in line
    assert line.endswith(
        "In 3 of 3 seeds the arm or the baseline was there at its first measurement, so how much sooner is not known."
    )


def test_arms_without_a_baseline_that_were_measured_differently_have_other_names(build: Build) -> None:
    arms = [FakeArm(label, constant_runs([1.0], protocol={"weights": label})) for label in "ab"]
    assert said(build(arms))[1:] == [
        f"{label}: {METRIC} (weights: {label}) at step 600 is 1.000, n = 1 seed." for label in "ab"
    ]


# ---- how numbers were made

NOTE = "300 images for 1280 features make a covariance singular and bias the distance upward: it ranks arms, no more."


@pytest.mark.parametrize(
    ("protocol", "is_told"),
    [
        ({"samples": 300, "real": 1541, "features": 1280}, True),
        ({"samples": 5000, "real": 300, "features": 1280}, True),
        ({"samples": 1281, "real": 0, "features": 1280}, False),  # a file that does not say how many it is of
        ({"samples": 300, "real": 1541}, False),
    ],
)
def test_too_few_images_for_the_features_are_told(build: Build, protocol, is_told):
    sweep = build([FakeArm("arm", [FakeRun(0, {600: 1.0}, run_id="run")])])
    files.write_record(sweep.root.run("run").path / "protocols.json", {METRIC: protocol})
    (line, *_) = methods(load_results(sweep.path))
    assert line.startswith(METRIC)
    assert line.endswith(NOTE) is is_told


@pytest.mark.parametrize(
    ("ema", "told"),
    [
        (
            {"ema": 0.9999},
            ["at decay 0.9999 the measured average still holds 61 % of the initial weights after 5,000 steps"],
        ),
        ({"ema": {"decay": 0.9999, "warmup": True}}, []),
        ({"ema": 0.999}, []),
        ({"ema": "damaged"}, []),
        ({}, []),
    ],
)
def test_an_average_that_still_holds_initial_weights_is_told(build: Build, ema, told):
    settled = FakeArm(
        "settled", [FakeRun(0, {600: 1.0})], config={"train": {"steps": 5000, "ema": {"decay": 0.9, "warmup": True}}}
    )
    arm = FakeArm("arm", [FakeRun(seed, {600: 1.0}) for seed in (0, 1)], config={"train": {"steps": 5000, **ema}})
    lines = [line for line in methods(load_results(build([settled, arm]).path)) if line.startswith("train.ema")]
    assert lines == [f"train.ema: {text}; set train.ema.warmup, or lower the decay." for text in told]
