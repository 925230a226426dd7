"""Plugins: a Python file of one's own, named by a spec, whose components are planned, trained and identified like built-in ones."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from repa_lab import load_results, plan, registry, sweep
from repa_lab.align.settings import REGULARIZERS
from repa_lab.orchestration.jobs import PrepareJob, TrainJob, parse_job
from repa_lab.registry import PluginError, load_plugins, loaded_plugins
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import RunConfig, RunOptions, SpecError, load_spec
from repa_lab.spec.identity import Run
from repa_lab.spec.json_schema import json_schema
from repa_lab.training.needs import needs_of
from repa_lab.training.trainer import Trainer
from tests.spec.examples import write

ROOT = Path(__file__).parents[1]
# DESIGN's, to the letter.
MINE = '''\
import torch
from repa_lab.plugins import Loss, Needs, Regularizer, RegularizerSettings, Shapes, Signals, regularizer

@regularizer("spread")
class Spread(Regularizer):
    """Keeps the mean tokens of a batch apart; no encoder is asked."""

    class Settings(RegularizerSettings):            # has weight, schedule, block_index
        margin: float = 1.0
        """Distance below which two images repel each other."""

    @classmethod
    def needs(cls, settings) -> Needs:              # what must be captured or computed for it; taps are block indices
        return Needs(taps=(settings.block_index,))

    def __init__(self, settings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)          # shapes.taps: widths of the asked taps; shapes.encoders: widths of the asked encoders

    def forward(self, signals: Signals, step: int) -> Loss:
        means = signals.taps[0].values.float().mean(1)             # Tokens: values (B, N, D), grid (h, w)
        closeness = (self.settings.margin - torch.pdist(means)).clamp_min(0).mean()
        return Loss(closeness, {"closeness": closeness})           # the trainer multiplies by the scheduled weight and logs the parts
'''
SPEC = """\
name: mine
plugins: [mine.py]
model: {family: sit, size: nano/2}
data: {source: digits, holdout: 64}
regularizer: {type: spread, weight: 0.1, margin: 0.5, schedule: {type: cosine, end: 0.0}}
train: {steps: 6, batch_size: 16, lr: 1e-3}
evaluate: {every: 6, samples: 16, sampler: {steps: 2}, extractor: {name: efficientnet_lite0}}
include: [{label: baseline, set: {regularizer.type: none}}]
run: {device: cpu, log_every: 1, wandb: {mode: disabled}}
"""
HEAD = "from repa_lab.plugins import Loss, Needs, Regularizer, RegularizerSettings, regularizer\n\n\n"


def forget() -> None:
    """Take all plugins out of this process, as if it had just begun."""
    for file in [*loaded_plugins(), *(origin.file for origin in map(REGULARIZERS.origin, REGULARIZERS.names) if origin)]:
        REGULARIZERS.drop(file)
        registry._LOADED.pop(file, None)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where runs are trained, so that one cache serves them all."""
    return tmp_path_factory.mktemp("home")


def spec_of(folder: Path, plugin: str = MINE, spec: str = SPEC, name: str = "mine.py") -> Path:
    write(folder, plugin, name)
    return write(folder, spec, "mine.yaml")


def ids(file: Path) -> dict[str, str]:
    return {entry.arm.label: entry.run.run_id for entry in plan(file, file.parent / "runs").runs}


def refusal(file: Path) -> list[str]:
    """What planning says of a spec, without the folder."""
    with pytest.raises(SpecError) as caught:
        plan(file, file.parent / "runs")
    return str(caught.value).replace(f"{file.parent}/", "").splitlines()


def run_cli(*words: object, cwd: Path) -> tuple[int, list[str]]:
    """A real command: its status and what it says, without the folder."""
    command = [sys.executable, "-m", "repa_lab", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).replace(f"{cwd}/", "").splitlines()


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
        found = {label: [row for row in root.run(run.run_id).rows() if "loss/total" in row] for label, run in self.runs(file).items()}
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
        trainer.aligner.regularizer.register_forward_hook(lambda module, inputs, loss: seen.append((inputs[0], loss)))
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
        folders = {label: RunsRoot(file.parent / "runs").run(run.run_id).path / "plugins" for label, run in runs.items()}
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
            assert {entry.arm.label: entry.standing.word for entry in after.runs} == {"all": "new", "baseline": "done"}
            assert ids(file)["all"] != before["all"]
            assert ids(file)["baseline"] == before["baseline"]
        finally:
            plugin.write_text(MINE)
        assert [entry.standing.word for entry in plan(file, file.parent / "runs").runs] == ["done", "done"]

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
        status, said = run_cli("export", run, "out", "--root", "runs", cwd=file.parent)
        assert status != 0
        assert len(said) == 1 and "unknown regularizer 'spread'" in said[0]
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


class TestPlanning:
    def test_its_fields_are_those_of_its_settings_class(self, tmp_path):
        config = load_spec(spec_of(tmp_path)).arms[0].config
        assert config.regularizer.model_dump(mode="json") == {
            "type": "spread",
            "weight": 0.1,
            "margin": 0.5,
            "block_index": None,
            "schedule": config.regularizer.schedule.model_dump(mode="json"),
        }
        assert needs_of(config).taps == (1,)  # what SiT nano suggests
        assert needs_of(config).encoders == ()
        assert Run.from_json("x", json.loads(json.dumps(Run("x", config, 0).to_json()))).config == config
        assert hash(config) == hash(load_spec(tmp_path / "mine.yaml").arms[0].config)

    def test_they_are_checked_and_may_be_varied(self, tmp_path):
        spec = spec_of(tmp_path, spec=SPEC + "axes: {regularizer.margin: [0.5, 1.0], regularizer.block_index: [0, 3]}\n")
        assert len(ids(spec)) == len(set(ids(spec).values())) == 5
        for change, line in (
            (("margin: 0.5", "margin: wide"), "5:42: regularizer.margin: expected a number, got 'wide'"),
            (("margin: 0.5", "marign: 0.5"), "5:42: regularizer.marign: unknown field 'marign'; allowed: block_index, margin, "
             "schedule, type, weight; did you mean 'margin'?"),
            (("margin: 0.5", "block_index: 99"), "5:42: regularizer.block_index: sit has 4 blocks: "
             "block_index must be 0 to 3, got 99"),
            (("margin: 0.5", "encoder: {}"), "5:42: regularizer.encoder: unknown field 'encoder'; allowed: block_index, margin, "
             "schedule, type, weight"),
        ):  # fmt: skip
            assert refusal(spec_of(tmp_path, spec=SPEC.replace(*change).replace("include: [", "# "))) == [f"mine.yaml:{line}"]

    def test_in_a_sweep_with_built_in_types_each_has_its_own_fields(self, tmp_path):
        types = "axes: {regularizer.type: [none, spread, repa]}\n"
        spec = SPEC.replace("margin: 0.5", "margin: 0.5, loss: nt_xent").replace("include: [", "# ") + types
        found = [arm.config.regularizer for arm in load_spec(spec_of(tmp_path, spec=spec)).arms]
        assert [one.type for one in found] == ["none", "spread", "repa"]
        assert (found[1].margin, hasattr(found[1], "loss")) == (0.5, False)
        assert (found[2].loss, hasattr(found[2], "margin")) == ("nt_xent", False)

    def test_the_schema_knows_its_fields(self, tmp_path):
        load_spec(spec_of(tmp_path))
        paths = json_schema()["$defs"]["Settings"]["properties"]
        assert paths["regularizer.margin"]["description"] == "Distance below which two images repel each other."

    def test_a_name_is_relative_to_the_file_that_gives_it(self, tmp_path):
        write(tmp_path, MINE, "base/mine.py")
        write(tmp_path, SPEC, "base/mine.yaml")
        file = write(tmp_path, "base: ../base/mine.yaml\nname: child\n", "specs/child.yaml")
        assert load_spec(file).plugins == (str(tmp_path / "base" / "mine.py"),)
        forget()
        write(tmp_path, "plugins: [../base/mine.py]\n", "fragments/with.yaml")
        plain = write(tmp_path, SPEC.replace("plugins: [mine.py]\n", ""), "specs/plain.yaml")
        assert load_spec(plain, None, [tmp_path / "fragments" / "with.yaml"]).arms[0].config.regularizer.type == "spread"

    def test_the_same_file_twice_is_one_plugin_and_is_run_once(self, tmp_path):
        counting = MINE + "import pathlib\nwith pathlib.Path(__file__).with_name('log').open('a') as log:\n    log.write('x')\n"
        file = spec_of(tmp_path, counting, SPEC.replace("[mine.py]", "[mine.py, ./mine.py]"))
        for _ in range(2):
            load_spec(file)
        assert (tmp_path / "log").read_text() == "x"
        (tmp_path / "mine.py").write_text(counting + "# edited\n")
        load_spec(file)
        assert (tmp_path / "log").read_text() == "xx"

    def test_what_an_edit_takes_away_is_gone(self, tmp_path):
        file = spec_of(tmp_path)
        load_spec(file)
        (tmp_path / "mine.py").write_text(MINE.replace('"spread"', '"spread2"'))
        assert refusal(file)[0].split(": ", 2)[2].startswith("unknown regularizer 'spread'; allowed: none, repa, urepa, spread2")
        assert load_spec(file, {"regularizer.type": "spread2"}).arms

    def test_planning_with_a_plugin_of_settings_alone_needs_no_torch(self, tmp_path):
        """As the built-in ones: the settings are decorated, and the class is imported by whoever trains."""
        plugin = (
            "from repa_lab.plugins import RegularizerSettings, regularizer\n\n\n"
            '@regularizer("lazy", "mypackage.methods:Lazy")\n'
            'class LazySettings(RegularizerSettings):\n    """Settings alone."""\n\n    type: str = "lazy"\n    margin: float = 1.0\n'
        )
        spec_of(tmp_path, plugin, SPEC.replace("type: spread", "type: lazy"))
        code = (
            "import sys; from repa_lab import plan; found = plan('mine.yaml');"
            "print(len(found.runs), sorted({'torch', 'mypackage'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["2", "[]"], done.stderr


GOOD = "    def forward(self, signals, step):\n        return Loss(signals.taps[0].values.mean())\n"
# A plugin whose regularizer is `mine`, and the lines that planning says of it.
BROKEN = {
    "raises at import": (
        HEAD + "def late():\n    raise RuntimeError('no such GPU\\nand more')\n\n\nlate()\n",
        ["mine.py:5:1: RuntimeError: no such GPU"],
    ),
    "imports what is not there": ("import torch\nimport nowhere\n", ["mine.py:2:1: ModuleNotFoundError: No module named 'nowhere'"]),
    "has a syntax error": (
        HEAD + "def forward(:\n    pass\n",
        ["mine.py:4:1: SyntaxError: invalid syntax (mine.py, line 4)"],
    ),
    "lacks forward": (
        HEAD + '@regularizer("mine")\nclass Mine(Regularizer):\n    pass\n',
        ["mine.py:4:1: TypeError: the regularizer 'mine' lacks the method forward(self, signals, step) -> Loss"],
    ),
    "is no regularizer": (
        HEAD + '@regularizer("mine")\nclass Mine:\n' + GOOD,
        ["mine.py:4:1: TypeError: the regularizer 'mine' must be a subclass of repa_lab.plugins.Regularizer"],
    ),
    "has settings of another kind": (
        HEAD + '@regularizer("mine")\nclass Mine(Regularizer):\n    class Settings:\n        margin = 1.0\n\n' + GOOD,
        ["mine.py:4:1: TypeError: the regularizer 'mine' must have a class Settings(RegularizerSettings)"],
    ),
    "has needs that are no classmethod": (
        HEAD + '@regularizer("mine")\nclass Mine(Regularizer):\n    def needs(self):\n        return Needs()\n\n' + GOOD,
        ["mine.py:4:1: TypeError: the regularizer 'mine' must have needs(cls, settings) as a classmethod"],
    ),
    "takes a built-in name": (
        HEAD + '@regularizer("repa")\nclass Mine(Regularizer):\n' + GOOD,
        ["mine.py:4:1: the regularizer 'repa' exists already (repa-lab); choose another name"],
    ),
    "takes its own name twice": (
        HEAD + '@regularizer("mine")\nclass One(Regularizer):\n' + GOOD + '\n\n@regularizer("mine")\nclass Two(Regularizer):\n' + GOOD,
        ["mine.py:10:1: the regularizer 'mine' exists already (mine.py:4); choose another name"],
    ),
    "asks for a block that is not there": (
        HEAD
        + '@regularizer("mine")\nclass Mine(Regularizer):\n    @classmethod\n    def needs(cls, settings):\n'
        + "        return Needs(taps=(0, 99))\n\n"
        + GOOD,
        ["mine.yaml:5:15: regularizer.type: mine.py:4: sit has 4 blocks: block_index must be 0 to 3, got 99"],
    ),
    "asks for an averaged block that is not there": (
        HEAD
        + '@regularizer("mine")\nclass Mine(Regularizer):\n    @classmethod\n    def needs(cls, settings):\n'
        + "        return Needs(ema_taps=('mid',))\n\n"
        + GOOD,
        ["mine.yaml:5:15: regularizer.type: mine.py:4: sit has 4 blocks: block_index must be 0 to 3, got mid"],
    ),
    "raises in needs": (
        HEAD
        + '@regularizer("mine")\nclass Mine(Regularizer):\n    @classmethod\n    def needs(cls, settings):\n'
        + "        return Needs(taps=(settings.blok,))\n\n"
        + GOOD,
        ["mine.yaml:5:15: regularizer.type: cannot tell what mine needs: mine.py:8: "
         "AttributeError: 'RegularizerSettings' object has no attribute 'blok'"],
    ),
    "needs what is no Needs": (
        HEAD
        + '@regularizer("mine")\nclass Mine(Regularizer):\n    @classmethod\n    def needs(cls, settings):\n'
        + "        return (1,)\n\n"
        + GOOD,
        ["mine.yaml:5:15: regularizer.type: cannot tell what mine needs: mine.py:4: needs must return a Needs, got tuple"],
    ),
}  # fmt: skip


class TestMistakes:
    """Each is one line that says where."""

    MINE = SPEC.replace("type: spread, weight: 0.1, margin: 0.5, schedule: {type: cosine, end: 0.0}", "type: mine")

    @pytest.mark.parametrize("plugin, expected", BROKEN.values(), ids=BROKEN.keys())
    def test_in_the_file_are_told_by_the_plan(self, tmp_path, plugin, expected):
        file = spec_of(tmp_path, plugin, self.MINE)
        before = REGULARIZERS.names
        assert [line.replace(f"{tmp_path}/", "") for line in refusal(file)] == expected
        assert not (tmp_path / "runs").exists()
        if expected[0].startswith("mine.py"):  # nothing of a file that cannot be loaded stays behind
            assert REGULARIZERS.names == before
            assert loaded_plugins() == {}

    def test_a_mended_plugin_is_loaded_at_once(self, tmp_path):
        file = spec_of(tmp_path, BROKEN["raises at import"][0])
        refusal(file)
        (tmp_path / "mine.py").write_text(MINE)
        assert len(ids(file)) == 2

    def test_a_name_that_another_plugin_has(self, tmp_path):
        write(tmp_path, HEAD + '@regularizer("spread")\nclass Other(Regularizer):\n' + GOOD, "other.py")
        file = spec_of(tmp_path, spec=SPEC.replace("[mine.py]", "[mine.py, other.py]"))
        line = MINE.splitlines().index('@regularizer("spread")') + 1
        assert refusal(file) == [f"other.py:4:1: the regularizer 'spread' exists already (mine.py:{line}); choose another name"]

    @pytest.mark.parametrize(
        "named, expected",
        [
            ("[gone.py]", "2:11: plugins.0: no Python file '{folder}/gone.py'"),
            ("[mine.py, .]", "2:20: plugins.1: no Python file '{folder}'"),
            ("mine.py", "2:1: plugins: expected a list, got 'mine.py'"),
            ("[3]", "2:11: plugins.0: no Python file 3"),
        ],
    )
    def test_a_file_that_is_not_there(self, tmp_path, named, expected):
        spec_of(tmp_path)
        file = write(tmp_path, SPEC.replace("[mine.py]", named), "mine.yaml")
        with pytest.raises(SpecError) as caught:
            load_spec(file)
        assert f"{file}:{expected.format(folder=tmp_path)}" in str(caught.value).splitlines()

    def test_the_command_says_one_line_and_writes_nothing(self, tmp_path):
        spec_of(tmp_path, BROKEN["has a syntax error"][0])
        for command in ("plan", "sweep"):
            status, said = run_cli(command, "mine.yaml", "--root", "runs", cwd=tmp_path)
            assert status != 0
            assert said == BROKEN["has a syntax error"][1]
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["mine.py", "mine.yaml"]
        status, said = run_cli("--plugin", "mine.py", "families", cwd=tmp_path)
        assert status != 0
        assert [line.removesuffix("") for line in said] == ["mine.py:4: SyntaxError: invalid syntax (mine.py, line 4)"]

    def test_in_forward_are_told_by_the_run(self, tmp_path, home):
        methods = {
            "raises": "        raise ValueError('no means\\nand more')\n",
            "raises_below": "        import torch\n        return Loss(torch.pdist(signals.taps[0].values))\n",
            "returns_a_number": "        return 3.0\n",
            "returns_a_vector": "        return Loss(signals.taps[0].values.mean(dim=(1, 2)))\n",
        }
        plugin = HEAD + "\n\n".join(
            f'@regularizer("{name}")\nclass M{number}(Regularizer):\n    def forward(self, signals, step):\n{body}'
            for number, (name, body) in enumerate(methods.items())
        )
        axes = f"axes: {{regularizer.type: [{', '.join(methods)}]}}\n"
        spec = self.MINE.replace("type: mine", "weight: 0.5, type: raises").replace("include: [", "# ") + axes
        spec = spec.replace("name: mine", "name: broken")
        outcome = sweep(spec_of(tmp_path, plugin, spec), home / "runs", workers=1)
        assert outcome.trained == 0
        lines = plugin.splitlines()
        at = {name: lines.index(f'@regularizer("{name}")') + 1 for name in methods}
        must = "must return a Loss with a scalar value, got"
        expected = {
            "raises": f"mine.py:{at['raises'] + 3}: ValueError: no means",
            "raises_below": f"mine.py:{at['raises_below'] + 4}: RuntimeError: ",
            "returns_a_number": f"mine.py:{at['returns_a_number']}: forward of the regularizer 'returns_a_number' {must} float",
            "returns_a_vector": f"mine.py:{at['returns_a_vector']}: forward of the regularizer 'returns_a_vector' {must} ",
        }
        labels = {entry.run.run_id: entry.arm.label for entry in plan(tmp_path / "mine.yaml", home / "runs").runs}
        said = {labels[run]: reason.replace(f"{tmp_path}/", "") for run, reason in outcome.failures.items()}
        assert said.keys() == {f"type={name}" for name in methods}
        for name, line in expected.items():
            assert said[f"type={name}"].startswith(line)
            assert "\n" not in said[f"type={name}"]


def as_told(job: TrainJob | PrepareJob) -> dict:
    return json.loads(json.dumps(job.to_json()))


class TestWorkers:
    """A worker trains with the very file that was planned with."""

    def jobs(self, file: Path, root: Path) -> list[TrainJob]:
        experiment = load_spec(file)
        runs = [entry.run for entry in plan(file, root).runs]
        return [TrainJob(run, "x", "mine", experiment.run, RunsRoot(root)) for run in runs]

    def test_they_load_what_was_planned_with(self, tmp_path):
        file = spec_of(tmp_path)
        job, _ = self.jobs(file, tmp_path / "runs")
        told = as_told(job)
        forget()
        assert as_told(parse_job(told)) == told
        assert list(loaded_plugins()) == [str(tmp_path / "mine.py")]

    def test_a_file_that_has_changed_is_refused(self, tmp_path):
        file = spec_of(tmp_path)
        job, _ = self.jobs(file, tmp_path / "runs")
        prepare = PrepareJob((job.run.config,), job.options, job.root)
        told = [as_told(one) for one in (job, prepare)]
        (tmp_path / "mine.py").write_text(MINE + "# edited\n")
        for one in told:
            for _ in range(2):
                with pytest.raises(PluginError) as caught:
                    parse_job(one)
                assert str(caught.value) == (
                    f"{tmp_path}/mine.py:1: the file has changed since the sweep was planned; start the sweep again"
                )
        (tmp_path / "mine.py").write_text(MINE)
        assert as_told(parse_job(told[0])) == told[0]

    def test_a_running_worker_refuses_it_and_goes_on(self, tmp_path):
        job, _ = self.jobs(spec_of(tmp_path), tmp_path / "runs")
        told = [as_told(one) for one in (job, PrepareJob((job.run.config,), job.options, job.root))]
        (tmp_path / "mine.py").write_text(MINE + "# edited\n")
        with subprocess.Popen(
            [sys.executable, "-m", "repa_lab.orchestration.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as worker:  # fmt: skip
            for one in told:
                worker.stdin.write(json.dumps(one) + "\n")
            worker.stdin.flush()
            ready, train, prepare = (json.loads(worker.stdout.readline()) for _ in range(3))
            worker.stdin.close()
        line = f"{tmp_path}/mine.py:1: the file has changed since the sweep was planned; start the sweep again"
        assert ready["kind"] == "ready"
        assert (train["kind"], train["run_id"], train["state"], train["error"]) == ("finished", job.run.run_id, State.FAILED, line)
        assert (prepare["kind"], prepare["error"]) == ("broken", line)
        assert not (tmp_path / "runs").exists()

    def test_they_are_told_of_no_plugin_that_their_run_does_not_use(self, tmp_path):
        """A notebook may have loaded others before, whose files are gone by now."""
        other = spec_of(tmp_path / "other", MINE.replace('"spread"', '"other"'), SPEC.replace("type: spread", "type: other"))
        load_spec(other)
        job, baseline = self.jobs(spec_of(tmp_path), tmp_path / "runs")
        (tmp_path / "other" / "mine.py").unlink()
        assert list(job.to_json()["plugins"]) == [str(tmp_path / "mine.py")]
        for one in (job, baseline):
            told = as_told(one)
            forget()
            assert as_told(parse_job(told)) == told
            load_plugins([tmp_path / "mine.py"])


class TestEntryPoints:
    """Plugins of installed packages need not be named."""

    def test_they_are_found_where_a_type_is_asked_for_that_nothing_else_has(self, tmp_path):
        site = tmp_path / "site"
        write(site, MINE, "mypackage/methods.py")
        write(site, "", "mypackage/__init__.py")
        write(site, "Metadata-Version: 2.1\nName: mypackage\nVersion: 1\n", "mypackage-1.dist-info/METADATA")
        write(site, "[repa_lab]\nmine = mypackage.methods\n", "mypackage-1.dist-info/entry_points.txt")
        write(tmp_path, SPEC.replace("plugins: [mine.py]\n", ""), "mine.yaml")
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); from repa_lab import plan; found = plan('mine.yaml', 'runs');"
            "print(*(entry.run.run_id for entry in found.runs))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == list(ids(spec_of(tmp_path)).values())  # the content of the file counts, as of any other

    def test_a_mistake_in_one_is_one_line(self, tmp_path):
        site = tmp_path / "site"
        write(site, "import repa_lab\n\nrepa_lab.nonsense()\n", "mypackage.py")
        write(site, "Metadata-Version: 2.1\nName: mypackage\nVersion: 1\n", "mypackage-1.dist-info/METADATA")
        write(site, "[repa_lab]\nmine = mypackage\n", "mypackage-1.dist-info/entry_points.txt")
        write(tmp_path, SPEC.replace("plugins: [mine.py]\n", "").replace("include: [", "# "), "mine.yaml")
        code = (
            f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['repa-lab', 'plan', 'mine.yaml'];"
            "from repa_lab.cli import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode not in (0, None)
        (line,) = (done.stdout + done.stderr).splitlines()
        assert f"{site}/mypackage.py:3: AttributeError: " in line


class TestDocumentation:
    """The plugins that the pages show are those that are run here, with their specs."""

    def blocks(self, page: str, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)

    def first_step(self, file: Path, root: Path):
        """A trainer of a spec's first run, what its regularizer was given and gave at its first step, and the step's row."""
        small = {"train.steps": 4, "train.batch_size": 8, "evaluate.samples": 16, "data.holdout": 64, "run.wandb.mode": "disabled"}
        run = plan(file, root, small).runs[0].run
        trainer, seen = Trainer(run, RunOptions(device="cpu"), RunsRoot(root).cache), []
        trainer.aligner.regularizer.register_forward_hook(lambda module, inputs, loss: seen.append((inputs[0], loss)))
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
        apart = np.mean([(output[i] - target[(i - 1) % 8]) ** 2 for i in range(8)])  # Eq. 6, with the next image of the batch
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
        assert trainer.aligner.needs.taps == (1,)  # of the settings' block, for there is no `needs`
        means = signals.taps[0].values.detach().double().numpy().mean(axis=1)
        distances = [np.linalg.norm(means[i] - means[j]) for i in range(8) for j in range(i)]
        assert loss.value.item() == pytest.approx(np.mean([max(0.5 - one, 0) for one in distances]), rel=1e-5)


class TestRegistry:
    def test_a_program_may_register_without_a_file_and_again(self, tmp_path):
        """As a notebook's cell does, which may be run any number of times."""
        source = HEAD + '@regularizer("cell")\nclass Cell(Regularizer):\n' + GOOD
        for _ in range(2):
            exec(compile(source, "<ipython-input-1>", "exec"), {"__name__": "__main__"})
        assert REGULARIZERS.origin("cell").line == 4
        config = load_spec({**BASE, "regularizer": {"type": "cell"}}).arms[0].config
        assert isinstance(config, RunConfig)

    def test_names_stand_in_the_order_of_their_registration(self, tmp_path):
        load_spec(spec_of(tmp_path))
        assert REGULARIZERS.names == ("none", "repa", "urepa", "spread")
        origin = REGULARIZERS.origin("spread")
        assert (origin.file, origin.digest) == (str(tmp_path / "mine.py"), loaded_plugins()[str(tmp_path / "mine.py")])


BASE = {"name": "x", "model": {"family": "sit", "size": "nano/2"}, "data": {"source": "digits"}, "train": {"steps": 1}}
