"""What stands in the tables, and the sheets of samples."""

from __future__ import annotations

import base64
import io
import math
import shutil
from collections.abc import Sequence

import pytest
from PIL import Image

from repa_lab.files import digest
from repa_lab.report.page import sheets
from repa_lab.report.results import load_results
from repa_lab.report.tables import (
    Table,
    cost_table,
    latex,
    protocols_table,
    provenance_table,
    speed_table,
    summary_tables,
    targets_tables,
)
from repa_lab.runs import RunsRoot, RunWriter, files

from .conftest import METRIC, Build, FakeArm, FakeRun, constant_runs


def cells(table: Table) -> list[list[str]]:
    return [list(row.values()) for row in table.rows]


def test_speedups_are_paired_and_over_every_measure_that_differs(build: Build) -> None:
    def runs(first: float, factor: int) -> list[FakeRun]:
        # An arm that falls twice as fast a step, and takes four times the FLOPs for it.
        return [FakeRun(seed, {100: first + seed, 200: 6.0, 400: 4.0}, flops=factor * 1e12) for seed in range(3)]

    slow = [FakeRun(seed, {200: 10.0 + seed, 400: 6.0}, flops=1e12) for seed in range(3)]
    sweep = build([FakeArm("base", slow), FakeArm("fast", runs(10.0, 4), "base")])
    table = targets_tables(load_results(sweep.path))[METRIC]
    headers = list(table.is_number)
    assert headers[3:7] == ["steps", "images", "device hours", "FLOPs"]
    assert [header.split(" [")[0] for header in headers[7:]] == [
        f"speed-up in {x}" for x in ("steps", "device hours", "FLOPs")
    ]
    ((target, arm, reached, steps, images, hours, flops, *ratios),) = cells(table)
    assert (target, arm, reached) == ("the baseline's final value", "fast", "3 of 3")
    assert (steps, images, hours, flops) == ("200", "12,800", "0.00556", "8.00e+14")
    assert ratios == ["2.00x [2.00, 2.00]", "2.00x [2.00, 2.00]", "0.50x [0.50, 0.50]"]


def test_the_cost_ledger_counts_a_shared_run_once(build: Build) -> None:
    shared = [FakeRun(0, {100: 2.0, 200: 1.0}, flops=1e12, run_id="shared")]
    own = [FakeRun(0, {100: 2.0, 200: 1.0}, flops=1e12)]
    arms = [FakeArm("a", shared), FakeArm("b", shared), FakeArm("c", own)]
    rows = cells(cost_table(load_results(build(arms).path)))
    assert [row[:2] for row in rows] == [["a", "1"], ["c", "1"], ["all runs, each once", "2"]]
    # 20 s of training and 10 s of evaluation a run; of 2e14 FLOPs four fifths are the denoiser's.
    assert rows[0][2:] == ["0.00556", "0.00278", "1.60e+14", "4.00e+13", "1,000", "33 %"]
    assert rows[2][2:] == ["0.0111", "0.00556", "3.20e+14", "8.00e+13", "2,000", "33 %"]


def test_the_encoders_hours_are_told_apart_within_those_of_training(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("a", [FakeRun(0, {100: 2.0, 200: 1.0}, flops=1e12, run_id="counted")])])
    assert not any(
        "encoder (within" in header for header in cost_table(load_results(sweep.path)).rows[0]
    )  # of an older version
    with RunWriter(root.run("counted")) as writer:
        for seconds in (4.5, 9.0):
            writer.row({"step": 200, "cost/encoder_seconds": seconds})
    table = cost_table(load_results(sweep.path))
    hours = table.rows[0]
    # 9 of 20 s; the share is that of 10 s of evaluation in 30.
    assert hours["device hours, training"] == "0.00556"
    assert hours["device hours, encoder (within training)"] == "0.00250"
    assert hours["evaluation's share of the hours"] == "33 %"


def test_the_speed_of_an_arm_is_the_mean_of_its_runs(build: Build, root: RunsRoot) -> None:
    runs = [FakeRun(seed, {200: 1.0}, run_id=f"run{seed}") for seed in (0, 1)]
    sweep = build([FakeArm("a", runs), FakeArm("older", [FakeRun(0, {200: 1.0}, run_id="older")])])
    assert not speed_table(load_results(sweep.path))  # nothing is recorded yet
    for seed, (utilisation, peak) in enumerate([(0.5, 2.0), (0.3, 4.0)]):
        with RunWriter(root.run(f"run{seed}")) as writer:
            row = {"step": 200, "images": 1600, "seconds": 20.0 + 20 * seed, "cost/data_seconds": 2.0}
            writer.row({**row, "cost/flops_utilisation": utilisation, "cost/peak_memory_gib": peak})
    table = speed_table(load_results(sweep.path))
    assert list(table.rows[0]) == [
        "arm",
        "runs",
        "images/s",
        "waiting for data",
        "FLOPs utilisation",
        "peak memory, GiB",
    ]
    # 1,600 images in 20 and in 40 s; 2 s of either are waiting.
    assert cells(table)[0] == ["a", "2", "60.0", "7.5 %", "40.0 %", "4.00"]
    assert cells(table)[1][3:] == ["n/a", "n/a", "n/a"]


def test_numbers_of_different_protocols_are_in_different_tables(build: Build) -> None:
    other = "fid:inception@10k/sde250"
    results = load_results(
        build([FakeArm("a", constant_runs([1.0])), FakeArm("b", constant_runs([2.0], metric=other))]).path
    )
    tables = summary_tables(results)
    assert {metric: [row["arm"] for row in table.rows] for metric, table in tables.items()} == {
        METRIC: ["a"],
        other: ["b"],
    }
    assert summary_tables(results, compared=False) == {}


def test_samples_stand_side_by_side_at_one_seed(build: Build) -> None:
    def runs(seeds: tuple[int, ...]) -> list[FakeRun]:
        return [FakeRun(seed, {100: 2.0, 200: 1.0, 300: 1.0}) for seed in seeds]

    # Seed 0 has samples in one arm only; seed 1 in both.
    sweep = build([FakeArm("base", runs((0, 1))), FakeArm("arm", runs((1, 2)), "base")])
    (sheet,) = sheets(load_results(sweep.path), sweep.path)
    assert (sheet.seed, sheet.steps, list(sheet.rows)) == (1, (200, 300), ["base", "arm"])
    ids = [run.run_id for arm in sweep.manifest.arms for run in arm.runs if run.seed == 1]
    links = [sample.link for samples in sheet.rows.values() for sample in samples if sample]
    assert links == [f"../by-id/{run_id}/samples/step-00000{step}.png" for run_id in ids for step in (200, 300)]


def test_many_steps_are_thinned_evenly_with_the_first_and_the_last(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("a", [FakeRun(0, {100: 1.0}, run_id="long")])])
    for step in range(200, 1200, 100):
        shutil.copy(root.run("long").samples / "step-00000100.png", root.run("long").samples / f"step-{step:08d}.png")
    (sheet,) = sheets(load_results(sweep.path), sweep.path)
    assert sheet.steps == (100, 300, 600, 900, 1100)


def test_large_samples_are_shrunk_for_the_page(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("a", [FakeRun(0, {100: 1.0}, run_id="large")])])
    noise = Image.effect_noise((2560, 1024), 90)
    noise.save(root.run("large").samples / "step-00000100.png")
    (sheet,) = sheets(load_results(sweep.path), sweep.path)
    sample = sheet.rows["a"][0]
    assert sample is not None
    assert sample.data is not None
    kind, _, content = sample.data.partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (640, 256)


def test_recorded_protocols_are_listed(build: Build) -> None:
    runs = constant_runs([1.0, 2.0], protocol={"samples": 500, "sampler": {"type": "ode", "steps": 20}})
    rows = cells(protocols_table(load_results(build([FakeArm("a", runs)]).path)))
    assert rows == [[METRIC, "samples", "500"], [METRIC, "sampler", '{"type": "ode", "steps": 20}']]


def test_provenances_that_differ_have_a_row_each(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(seed, {100: 1.0}, run_id=f"run{seed}") for seed in range(3)])])
    old = root.run("run0").provenance
    files.write_record(root.run("run0").path / "provenance.json", {**old, "git": None, "packages": {"torch": "2.8.0"}})
    rows = cells(provenance_table(load_results(sweep.path)))
    assert [row for row in rows if row[0].startswith(("git", "packages.torch"))] == [
        ["packages.torch", "2.8.0", "1"],
        ["packages.torch", "2.9.0", "2"],
        ["git", "n/a", "1"],
        ["git.commit", "0123456789abcdef", "2"],
        ["git.dirty", "false", "2"],
    ]


def exponential(every: int, last: int = 3000) -> dict[int, float]:
    return {step: 20 + 400 * math.exp(-step / 300) for step in range(every, last + 1, every)}


@pytest.mark.parametrize(("own", "other"), [(100, 1000), (1000, 100), (200, 300)])
def test_equal_curves_that_were_measured_at_other_steps_are_equally_fast(build: Build, own: int, other: int) -> None:
    # Straight lines between few points lie above a convex curve, and a late first look finds it crossed long ago.
    arms = [FakeArm("base", [FakeRun(seed, exponential(other)) for seed in range(3)])]
    arms += [FakeArm("arm", [FakeRun(seed, exponential(own)) for seed in range(3)], "base")]
    results = load_results(build(arms, targets={METRIC: [100.0, 30.0]}).path)
    rows = [row for row in cells(targets_tables(results)[METRIC]) if row[1] == "arm"]
    assert [row[-2:] for row in rows] == 3 * [["1.00x [1.00, 1.00]", "1.00x [1.00, 1.00]"]]


def test_the_seeds_that_have_a_target_are_those_it_can_be_reached_in(build: Build) -> None:
    base = [FakeRun(0, {100: 9.0, 200: 5.0}), 1, 2]
    arm = [FakeRun(seed, {100: 9.0, 200: 3.0}) for seed in range(3)]
    tables = targets_tables(load_results(build([FakeArm("b", base), FakeArm("a", arm, "b")]).path))
    ((target, _, reached, steps, *_),) = cells(tables[METRIC])
    assert (target, reached, steps) == ("the baseline's final value", "1 of 1", "167")


def test_two_protocols_of_one_name_never_share_a_table(build: Build) -> None:
    def arm(label: str, value: float, weights: Sequence[str], baseline: str | None = None) -> FakeArm:
        (run, *_), recorded = constant_runs([value]), [{"weights": name, "samples": 500} for name in weights]
        return FakeArm(label, [FakeRun(seed, run.curve, protocol=one) for seed, one in enumerate(recorded)], baseline)

    long = [f"{digit}" * 64 for digit in "ab"]
    arms = [
        arm("base", 9.0, [long[0]] * 2),
        arm("alike", 7.0, [long[0]] * 2, "base"),
        arm("other", 5.0, [long[1]] * 2, "base"),
    ]
    arms += [arm("lone", 4.0, [long[1]] * 2), arm("mixed", 3.0, long)]
    results = load_results(build(arms, targets={METRIC: [8.0]}).path)
    first, second = (f"{METRIC} (weights: {one[:12]}... #{digest(one)[:12]})" for one in long)
    assert {name: [row["arm"] for row in table.rows] for name, table in summary_tables(results).items()} == {
        first: ["base", "alike", "mixed"],
        second: ["other", "lone"],
    }
    assert cells(summary_tables(results)[first])[2][3] == "n/a"  # no mean over two protocols
    reached = {
        name: [row["arm"] for row in table.rows if row["target"] == "8"]
        for name, table in targets_tables(results).items()
    }
    assert reached == {first: ["base", "alike"], second: ["other", "lone"]}


def test_only_what_differs_within_a_field_is_named(build: Build) -> None:
    held = [{"encoder": {"name": name, "image_size": 32}, "seed": seed} for seed, name in enumerate(("dino", "mae"))]
    arms = [FakeArm(label, constant_runs([1.0], protocol=one)) for label, one in zip("ab", held, strict=True)]
    assert list(summary_tables(load_results(build(arms).path))) == [
        f"{METRIC} (encoder.name: dino)",
        f"{METRIC} (encoder.name: mae)",
    ]


# ---- cells as Markdown and LaTeX

TABLE = Table([{"arm": "a_b", "n": "3", "p": "<0.001"}, {"arm": "x & y", "n": "2 of 3", "p": "n/a"}])


def test_columns_of_numbers_are_known() -> None:
    assert TABLE.is_number == {"arm": False, "n": True, "p": True}
    assert Table([{"none": "n/a"}, {"none": ""}]).is_number == {"none": False}


def test_latex_by_hand() -> None:
    assert TABLE.latex.splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"arm & n & p \\",
        r"\midrule",
        r"a\_b & 3 & \textless{}0.001 \\",
        r"x \& y & 2 of 3 & n/a \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_shows_what_it_is_given() -> None:
    assert latex("50 % of $5 #1 {a}_b^c~\\") == (
        r"50 \% of \$5 \#1 \{a\}\_b\textasciicircum{}c\textasciitilde{}\textbackslash{}"
    )


def test_wide_tables_are_shrunk_to_the_line() -> None:
    wide = Table([dict(zip("abcdefg", "1234567", strict=True))]).latex
    assert wide.startswith("\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}{rrrrrrr}")
    assert wide.endswith("\\end{tabular}}")


def test_empty_columns_are_left_out() -> None:
    table = Table([{"a": "1", "b": "n/a", "c": ""}, {"a": "2", "b": "n/a", "c": "x"}])
    assert table.without_empty_columns().rows == [{"a": "1", "c": ""}, {"a": "2", "c": "x"}]


def test_markdown_aligns_numbers_and_escapes_bars() -> None:
    assert Table([{"a|b": "x|y", "n": "1"}]).markdown == "| a\\|b | n |\n| --- | ---: |\n| x\\|y | 1 |"
