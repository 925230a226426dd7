"""A mistake in a plugin is one line with its file and line; a plugin that changes under a worker is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from repa_lab import plan, sweep
from repa_lab.align.settings import REGULARIZERS
from repa_lab.orchestration.scheduler import MessageKind, PackedJob, PrepareJob, Task, TrainJob
from repa_lab.registry import PluginError, load_plugins, loaded_plugins
from repa_lab.runs import RunsRoot
from repa_lab.spec import SpecError, load_spec
from tests.plugins.mine import GOOD, HEAD, MINE, SPEC, forget, ids, refusal, run_cli, spec_of
from tests.spec.examples import write

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

    def test_an_unknown_field_is_told_the_fields_of_its_own_section(self, tmp_path):
        plugin = HEAD + (
            "from repa_lab.settings import Settings\n\n\n"
            "class Steady(Settings):\n    level: float = 1.0\n\n\n"
            '@regularizer("mine")\nclass Mine(Regularizer):\n    class Settings(RegularizerSettings):\n'
            "        resample: Steady = Steady()\n\n" + GOOD
        )
        for kind, allowed in (("mine", "level"), ("repa", "side, when")):
            spec = self.MINE.replace("type: mine", f"type: {kind}, resample: {{nothing: 1}}")
            found = f"mine.yaml:5:38: regularizer.resample.nothing: unknown field 'nothing'; allowed: {allowed}"
            assert refusal(spec_of(tmp_path, plugin, spec)) == [found]

    def test_a_mended_plugin_is_loaded_at_once(self, tmp_path):
        file = spec_of(tmp_path, BROKEN["raises at import"][0])
        refusal(file)
        (tmp_path / "mine.py").write_text(MINE)
        assert len(ids(file)) == 2

    def test_a_name_that_another_plugin_has(self, tmp_path):
        write(tmp_path, HEAD + '@regularizer("spread")\nclass Other(Regularizer):\n' + GOOD, "other.py")
        file = spec_of(tmp_path, spec=SPEC.replace("[mine.py]", "[mine.py, other.py]"))
        line = MINE.splitlines().index('@regularizer("spread")') + 1
        assert refusal(file) == [
            f"other.py:4:1: the regularizer 'spread' exists already (mine.py:{line}); choose another name"
        ]

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
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
            "mine.py",
            "mine.yaml",
        ]
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


def as_data(job: TrainJob) -> tuple:
    return job.name, job.task.run.to_json(), job.options, job.root.path


class TestWorkers:
    """A worker trains with the very file that was planned with."""

    def jobs(self, file: Path, root: Path) -> list[TrainJob]:
        experiment = load_spec(file)
        runs = [entry.run for entry in plan(file, root).runs]
        return [TrainJob(Task(run, "x"), "mine", experiment.run, RunsRoot(root)) for run in runs]

    def test_they_load_what_was_planned_with(self, tmp_path):
        file = spec_of(tmp_path)
        job, _ = self.jobs(file, tmp_path / "runs")
        packed = PackedJob.of(job)
        forget()
        assert as_data(packed.unpacked()) == as_data(job)
        assert list(loaded_plugins()) == [str(tmp_path / "mine.py")]

    def test_settings_that_no_name_of_the_module_leads_to_travel_too(self, tmp_path):
        plugin = HEAD + (
            "def make(name):\n"
            "    @regularizer(name)\n"
            "    class Made(Regularizer):\n"
            "        class Settings(RegularizerSettings):\n"
            "            margin: float = 1.0\n"
            '            """A distance."""\n\n'
            "        def forward(self, signals, step):\n"
            "            return Loss(signals.taps[0].values.mean())\n\n\n"
            'for name in ("spread", "other"):\n'
            "    make(name)\n"
        )
        for job in self.jobs(spec_of(tmp_path, plugin), tmp_path / "runs"):
            packed = PackedJob.of(job)
            forget()
            unpacked = packed.unpacked()
            assert as_data(unpacked) == as_data(job)

    def test_a_file_that_has_changed_is_refused(self, tmp_path):
        file = spec_of(tmp_path)
        job, _ = self.jobs(file, tmp_path / "runs")
        prepare = PrepareJob((job.task.run.config,), job.options, job.root)
        told = [PackedJob.of(one) for one in (job, prepare)]
        (tmp_path / "mine.py").write_text(MINE + "# edited\n")
        for one in told:
            for _ in range(2):
                with pytest.raises(PluginError) as caught:
                    one.unpacked()
                assert str(caught.value) == (
                    f"{tmp_path}/mine.py:1: the file has changed since the sweep was planned; start the sweep again"
                )
        (tmp_path / "mine.py").write_text(MINE)
        assert as_data(told[0].unpacked()) == as_data(job)

    def test_a_running_worker_refuses_it_and_goes_on(self, tmp_path):
        job, _ = self.jobs(spec_of(tmp_path), tmp_path / "runs")
        told = [PackedJob.of(one) for one in (job, PrepareJob((job.task.run.config,), job.options, job.root))]
        (tmp_path / "mine.py").write_text(MINE + "# edited\n")
        with subprocess.Popen(
            [sys.executable, "-m", "repa_lab.orchestration.executors.forkserver", "work"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as worker:  # fmt: skip
            jobs, messages = Connection(os.dup(worker.stdin.fileno())), Connection(os.dup(worker.stdout.fileno()))
            worker.stdin.close()
            for one in (({}, str(tmp_path)), *told):
                jobs.send(one)
            train, prepare = messages.recv(), messages.recv()
            jobs.close()
        line = f"{tmp_path}/mine.py:1: the file has changed since the sweep was planned; start the sweep again"
        assert (train.kind, train.job, train.error) == (MessageKind.FAILED, job.task.run.run_id, line)
        assert (prepare.kind, prepare.job, prepare.error) == (MessageKind.FAILED, "prepare", line)
        assert not (tmp_path / "runs").exists()

    def test_they_are_told_of_no_plugin_that_their_run_does_not_use(self, tmp_path):
        """A notebook may have loaded others before, whose files are gone by now."""
        other = spec_of(
            tmp_path / "other", MINE.replace('"spread"', '"other"'), SPEC.replace("type: spread", "type: other")
        )
        load_spec(other)
        job, baseline = self.jobs(spec_of(tmp_path), tmp_path / "runs")
        (tmp_path / "other" / "mine.py").unlink()
        assert list(PackedJob.of(job).plugins) == [str(tmp_path / "mine.py")]
        for one in (job, baseline):
            packed = PackedJob.of(one)
            forget()
            assert as_data(packed.unpacked()) == as_data(one)
            load_plugins([tmp_path / "mine.py"])
