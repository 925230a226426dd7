"""DESIGN's plugin trained beside its baseline, and the one that the README shows."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from repa_lab import load_results, plan, sweep
from repa_lab.cli import app
from repa_lab.runs import RunsRoot
from repa_lab.spec import RunOptions, load_spec
from repa_lab.spec.identity import Run
from repa_lab.training.trainer import Trainer
from tests.plugins.mine import MINE, SPEC, forget, ids, run_cli, spec_of
from tests.spec.examples import write

ROOT = Path(__file__).parents[2]


class TestTraining:
    @pytest.fixture(scope="class")
    def trained(self, home):
        """DESIGN's regularizer and its baseline, trained by a real worker: the outcome and the spec."""
        file = spec_of(home)
        forget()
        outcome = sweep(file, home / "runs", workers=1)
        forget()
        return outcome, file

    def runs(self, file: Path) -> dict[str, Run]:
        return {entry.arm.label: entry.run for entry in plan(file, file.parent / "runs").runs}

    def test_the_method_logs_its_parts_and_the_baseline_none(self, trained):
        outcome, file = trained
        assert (outcome.trained, outcome.failures) == (2, {})
        root = RunsRoot(file.parent / "runs")
        found = {
            label: [row for row in root.run(run.run_id).rows() if "loss/total" in row]
            for label, run in self.runs(file).items()
        }
        assert [row["step"] for row in found["all"]] == [1, 2, 3, 4, 5, 6]
        for step, row in enumerate(found["all"]):
            weight = 0.05 * (1 + math.cos(math.pi * step / 6))
            assert row["align/weight"] == pytest.approx(weight, abs=1e-12)
            assert 0 < row["align/closeness"] <= 0.5
            assert row["loss/aligned"] == pytest.approx(weight * row["align/closeness"], rel=1e-5)
            assert row["loss/total"] == pytest.approx(row["loss/denoise"] + row["loss/aligned"], rel=1e-6)
        assert not any(name.startswith(("align/", "loss/aligned")) for row in found["baseline"] for name in row)
        assert found["all"][0]["loss/denoise"] == found["baseline"][0]["loss/denoise"]  # one seed, one randomness
        assert found["all"][-1]["loss/denoise"] != found["baseline"][-1]["loss/denoise"]

    def test_the_loss_is_what_the_formula_gives(self, trained, home):
        _, file = trained
        run = self.runs(file)["all"]
        trainer = Trainer(run, RunOptions(device="cpu"), RunsRoot(home / "runs").cache)
        seen = []
        trainer.aligner.module.register_forward_hook(lambda module, inputs, loss: seen.append((inputs[0], loss)))
        outcome = trainer.step(next(trainer.batches()))
        ((signals, loss),) = seen
        means = signals.taps[0].values.detach().double().numpy().mean(axis=1)
        distances = [np.linalg.norm(means[i] - means[j]) for i in range(16) for j in range(i)]
        expected = np.mean([max(0.5 - distance, 0) for distance in distances])
        assert loss.value.item() == pytest.approx(expected, rel=1e-5)
        logged = RunsRoot(file.parent / "runs").run(run.run_id).rows()[0]
        assert logged["align/closeness"] == pytest.approx(expected, rel=1e-5)
        assert outcome.row()["align/closeness"] == pytest.approx(expected, rel=1e-5)

    def test_the_report_compares_it_with_the_baseline(self, trained):
        outcome, _ = trained
        results = load_results(outcome.path)
        assert set(results.summary["arm"]) == {"all", "baseline"}
        assert results.summary.query("arm == 'all'")["diff"].notna().any()
        assert "align/closeness" in set(results.curves["metric"])

    def test_a_run_keeps_a_copy_of_its_plugin_and_the_baseline_none(self, trained):
        _, file = trained
        runs = self.runs(file)
        folders = {
            label: RunsRoot(file.parent / "runs").run(run.run_id).path / "plugins" for label, run in runs.items()
        }
        assert [copy.name for copy in folders["all"].iterdir()] == ["mine.py"]
        assert (folders["all"] / "mine.py").read_text() == MINE
        assert not folders["baseline"].exists()

    def test_an_edit_makes_new_runs_of_its_arms_and_leaves_the_baseline(self, trained):
        _, file = trained
        before = ids(file)
        plugin = file.parent / "mine.py"
        try:
            plugin.write_text(MINE + "# a thought\n")
            after = plan(file, file.parent / "runs")
            assert {entry.arm.label: str(entry.status) for entry in after.runs} == {"all": "new", "baseline": "done"}
            assert ids(file)["all"] != before["all"]
            assert ids(file)["baseline"] == before["baseline"]
        finally:
            plugin.write_text(MINE)
        assert [str(entry.status) for entry in plan(file, file.parent / "runs").runs] == ["done", "done"]

    def test_a_moved_plugin_is_the_same(self, trained, tmp_path):
        _, file = trained
        before = ids(file)
        forget()
        elsewhere = write(tmp_path, SPEC.replace("[mine.py]", "[methods/other_name.py]"), "mine.yaml")
        write(tmp_path, MINE, "methods/other_name.py")
        assert ids(elsewhere) == before

    def test_commands_on_a_run_need_the_plugin_by_name(self, trained):
        _, file = trained
        run = self.runs(file)["all"].run_id
        forget()
        words = ["export", run, str(file.parent / "out"), "--root", str(file.parent / "runs")]
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 2
        assert found.output == (
            f"run {run} was trained with a plugin that is not loaded, mine.py, which registers regularizer.type 'spread';"
            " name the file with repa-lab --plugin FILE\n"
        )
        assert not (file.parent / "out").exists()
        status, said = run_cli("--plugin", "mine.py", "export", run, "out", "--root", "runs", cwd=file.parent)
        assert (status, said) == (0, ["ema weights of step 6: out"])

    def test_what_is_exported_has_nothing_of_the_method(self, trained, tmp_path):
        """And a run's directory loads nothing that it holds."""
        _, file = trained
        found = RunsRoot(file.parent / "runs").run(self.runs(file)["all"].run_id)
        copy = found.path / "plugins" / "mine.py"
        kept = copy.read_text()
        try:
            copy.write_text("raise RuntimeError('a run directory was loaded')\n")
            assert ids(file)
            load_results(file.parent / "runs" / "mine")
        finally:
            copy.write_text(kept)


class TestDocumentation:
    """The plugins that the pages show are those that are run here, with their specs."""

    def blocks(self, page: str, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)

    def first_step(self, file: Path, root: Path):
        """A trainer of a spec's first run, what its regularizer was given and gave at its first step, and the step's row."""
        small = {
            "train.steps": 4,
            "train.batch_size": 8,
            "evaluate.samples": 16,
            "data.holdout": 64,
            "run.wandb.mode": "disabled",
        }
        run = plan(file, root, small).runs[0].run
        trainer, seen = Trainer(run, RunOptions(device="cpu"), RunsRoot(root).cache), []
        trainer.aligner.module.register_forward_hook(lambda module, inputs, loss: seen.append((inputs[0], loss)))
        row = trainer.step(next(trainer.batches())).row()
        ((signals, loss),) = seen
        return trainer, signals, loss, row

    def test_contrastive_flow_matching(self, tmp_path, home):
        (plugin,) = [block for block in self.blocks("docs/extending.md", "python") if "contrastive_flow" in block]
        (spec,) = [block for block in self.blocks("docs/extending.md", "yaml") if "name: contrastive" in block]
        write(tmp_path, plugin, "contrastive.py")
        file = write(tmp_path, spec, "contrastive.yaml")
        assert [arm.config.regularizer.type for arm in load_spec(file).arms] == ["contrastive_flow", "none"]
        _, signals, loss, row = self.first_step(file, home / "runs")
        output, target = (tensor.detach().double().numpy() for tensor in signals.prediction)
        apart = np.mean(
            [(output[i] - target[(i - 1) % 8]) ** 2 for i in range(8)]
        )  # Eq. 6, with the next image of the batch
        assert loss.value.item() == pytest.approx(-apart, rel=1e-5)
        assert row["align/distance"] == pytest.approx(apart, rel=1e-5)
        assert row["align/weight"] == 0.05
        assert row["loss/total"] == pytest.approx(((output - target) ** 2).mean() - 0.05 * apart, rel=1e-5)

    def test_the_one_of_the_readme(self, tmp_path, home):
        (plugin,) = [block for block in self.blocks("README.md", "python") if '@regularizer("spread")' in block]
        (part,) = [block for block in self.blocks("README.md", "yaml") if "type: spread" in block]
        around = "name: readme\nmodel: {family: sit, size: nano/2}\ndata: {source: digits}\ntrain: {steps: 4}\n"
        around += "evaluate: {extractor: {name: efficientnet_lite0}}\n"
        write(tmp_path, plugin, "mine.py")
        trainer, signals, loss, _ = self.first_step(write(tmp_path, around + part, "readme.yaml"), home / "runs")
        assert trainer.aligner.terms[0].needs.taps == (1,)  # of the settings' block, for there is no `needs`
        means = signals.taps[0].values.detach().double().numpy().mean(axis=1)
        distances = [np.linalg.norm(means[i] - means[j]) for i in range(8) for j in range(i)]
        assert loss.value.item() == pytest.approx(np.mean([max(0.5 - one, 0) for one in distances]), rel=1e-5)
