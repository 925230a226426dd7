"""The commands that read specs, as a user meets them."""

import json
from pathlib import Path

import pytest

from repa_lab.spec import load_spec
from tests.test_cli import cli

ROOT = Path(__file__).parents[1]
SPEC = """\
name: one
model: {family: sit, size: nano/2}
regularizer: {type: repa, weight: 0.5, encoder: {name: efficientnet_lite0, image_size: 64}}
data: {source: digits}
train: {steps: 10, batch_size: 8}
axes: {regularizer.weight: {logspace: [0.1, 1, 3]}}
include: [{label: baseline, set: {regularizer.type: none}}]
seeds: 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.yaml").write_text(SPEC)
    (tmp_path / "more.yaml").write_text("train: {steps: 20}\nseeds: 1\n")
    (tmp_path / "less.yaml").write_text("train: {steps: 5}\n")
    return tmp_path


class TestWith:
    def test_fragments_lie_over_the_spec_in_order_and_under_set(self, folder):
        words = ("plan", "one.yaml", "--json", "--with", "more.yaml", "--with", "less.yaml")
        runs = json.loads(cli(*words, cwd=folder).stdout)["runs"]
        assert [(run["arm"], run["seed"], run["steps"]) for run in runs] == [
            ("weight=0.1", 0, 5),
            ("weight=0.316228", 0, 5),
            ("weight=1", 0, 5),
            ("baseline", 0, 5),
        ]
        over = json.loads(cli(*words, "--set", "train.steps=7", cwd=folder).stdout)["runs"]
        assert {run["steps"] for run in over} == {7}

    @pytest.mark.parametrize("command", ["plan", "sweep", "run", "explain"])
    def test_a_bad_fragment_is_told_at_its_own_line(self, folder, command):
        (folder / "bad.yaml").write_text("# mine\ntrain: {lr: -1}\n")
        done = cli(command, "one.yaml", "--with", "bad.yaml", cwd=folder)
        message = "bad.yaml:2:9: train.lr: expected a number of more than 0.0, got -1\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
        assert not (folder / "runs").exists()

    def test_a_run_of_a_fragment_is_the_run_of_the_merged_spec(self, folder):
        (folder / "merged.yaml").write_text(SPEC.replace("seeds: 2", "seeds: 1").replace("steps: 10", "steps: 20"))
        words = [("one.yaml", "--with", "more.yaml"), ("merged.yaml",)]
        ids = [
            [run["run_id"] for run in json.loads(cli("plan", *w, "--json", cwd=folder).stdout)["runs"]] for w in words
        ]
        assert ids[0] == ids[1]
        assert len(set(ids[0])) == 4


class TestSchema:
    def test_it_is_printed_or_written_once(self, folder):
        printed = cli("schema", cwd=folder)
        assert json.loads(printed.stdout)["title"] == "repa-lab spec"
        assert cli("schema", "--output", "s.json", cwd=folder).stdout == ""
        assert (folder / "s.json").read_text() == printed.stdout
        again = cli("schema", "--output", "s.json", cwd=folder)
        assert (again.returncode, again.stderr) == (2, "'s.json' exists; name a new file\n")


class TestExplain:
    def test_a_field_in_aligned_columns(self, folder):
        done = cli("explain", "one.yaml", "regularizer.weight", "--set", "train.lr=1", cwd=folder)
        assert done.stdout.splitlines() == [
            "regularizer.weight  0.1       one.yaml:6:29  in 1 of 4 arms: weight=0.1",
            "regularizer.weight  0.316228  one.yaml:6:29  in 1 of 4 arms: weight=0.316228",
            "regularizer.weight  1.0       one.yaml:6:29  in 1 of 4 arms: weight=1",
        ]  # the baseline has no weight

    def test_a_section_of_an_arm(self, folder):
        done = cli(
            "explain",
            "one.yaml",
            "train",
            "--arm",
            "baseline",
            "--with",
            "more.yaml",
            "--set",
            "train.lr=1",
            cwd=folder,
        )
        lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        assert {path: text.split() for path, text in lines.items()} == {
            "train.steps": ["20", "more.yaml:1:9"],
            "train.batch_size": ["8", "one.yaml:5:20"],
            "train.lr": ["1.0", "--set"],
            "train.lr_schedule.type": ["constant", "default"],
            "train.lr_schedule.warmup_steps": ["0", "default"],
            "train.lr_schedule.decay_steps": ["0", "default"],
            "train.lr_schedule.end": ["0.0", "default"],
            "train.optimizer.type": ["AdamW", "default"],
            "train.optimizer.betas": ["null", "default"],
            "train.optimizer.eps": ["null", "default"],
            "train.optimizer.momentum": ["null", "default"],
            "train.loss_weight.type": ["none", "default"],
            "train.loss_weight.gamma": ["5.0", "default"],
            "train.weight_decay": ["0.0", "default"],
            "train.grad_clip": ["1.0", "default"],
            "train.ema": ["0.9999", "default"],
            "train.label_dropout": ["0.1", "default"],
            "train.time": ["null", "default"],
        }
        assert (
            len(
                {
                    line.index(source.split()[1])
                    for line, source in zip(done.stdout.splitlines(), lines.values(), strict=True)
                }
            )
            == 1
        )

    def test_json(self, folder):
        (found,) = json.loads(cli("explain", "one.yaml", "seeds", "--json", cwd=folder).stdout)
        assert found == {"path": "seeds", "value": 2, "source": "one.yaml:8:1", "arms": []}

    def test_mistakes(self, folder):
        done = cli("explain", "one.yaml", "train.stepz", cwd=folder)
        assert done.returncode == 2 and done.stderr.startswith("<given>: train.stepz: unknown field 'stepz'; allowed: ")
        done = cli("explain", "one.yaml", "--arm", "base", cwd=folder)
        message = "<given>: --arm: no arm 'base'; there are: weight=0.1; weight=0.316228; weight=1; baseline; did you mean 'baseline'?\n"
        assert (done.returncode, done.stderr) == (2, message)


class TestDiff:
    def test_equal_specs(self, folder):
        (folder / "same.yaml").write_text(SPEC.replace("{logspace: [0.1, 1, 3]}", "[0.1, 0.316228, 1.0]"))
        done = cli("diff", "one.yaml", "same.yaml", cwd=folder)
        assert (done.returncode, done.stdout) == (0, "8 and 8 runs, 8 of them shared\n")

    def test_specs_that_differ(self, folder):
        (folder / "two.yaml").write_text(
            SPEC.replace("name: one", "name: two")
            .replace("1, 3]", "1, 2]")
            .replace("seeds: 2", "seeds: 3\nbudget: {gpu_hours: 1}")
        )
        done = cli("diff", "one.yaml", "two.yaml", cwd=folder)
        assert done.returncode == 1
        assert done.stdout.splitlines() == [
            "only in one.yaml: arm 'weight=0.316228'",
            "                  one.yaml  two.yaml",
            "name              one       two",
            "seeds             2         3",
            "budget.gpu_hours  null      1.0",
            "8 and 9 runs, 6 of them shared",
        ]
        found = json.loads(cli("diff", "one.yaml", "two.yaml", "--json", cwd=folder).stdout)
        assert (found["equal"], found["removed"], found["added"]) == (False, ["weight=0.316228"], [])
        assert found["runs"] == {"a": 8, "b": 9, "shared": 6}
        assert {"path": "seeds", "a": 2, "b": 3, "arms": []} in found["fields"]

    def test_runs_by_id_and_by_folder(self, folder):
        describe_runs(folder, {"aaa": ("weight=0.1", 0), "bbb": ("weight=1", 1), "ccc": ("weight=0.1", 0)})
        done = cli("diff", "aaa", folder / "runs/by-id/bbb", cwd=folder)
        assert done.returncode == 1
        assert [line.split() for line in done.stdout.splitlines()[1:]] == [
            ["regularizer.weight", "0.1", "1.0"],
            ["seed", "0", "1"],
        ]
        same = cli("diff", "aaa", "ccc", "--json", cwd=folder)
        assert (same.returncode, json.loads(same.stdout)) == (0, {"equal": True, "fields": []})
        done = cli("diff", "aaa", "zzz", cwd=folder)
        assert (done.returncode, done.stderr) == (2, "no run 'zzz' in runs; `repa-lab status` lists them\n")

    def test_what_cannot_be_compared(self, folder):
        done = cli("diff", "one.yaml", "aaa", cwd=folder)
        assert (done.returncode, done.stderr) == (
            2,
            "'one.yaml' and 'aaa' are a spec and a run; compare two of a kind\n",
        )
        (folder / "bad.yaml").write_text("name: q\n")
        done = cli("diff", "one.yaml", "bad.yaml", cwd=folder)
        assert done.returncode == 2 and done.stderr.splitlines()[0] == "bad.yaml:1:1: data: this field is required"
        (folder / "lost.yaml").write_text(SPEC.replace("{source: digits}", "{source: imagefolder, path: gone}"))
        done = cli("diff", "one.yaml", "lost.yaml", cwd=folder)
        assert done.returncode == 2 and done.stderr.startswith("lost.yaml:4:29: data.path: ")


def describe_runs(folder, wanted):
    """Run directories as training would begin them."""
    from repa_lab.runs import RunsRoot
    from repa_lab.runs.directory import RunWriter
    from repa_lab.spec import load_spec
    from repa_lab.spec.identity import Run

    arms = {arm.label: arm.config for arm in load_spec(folder / "one.yaml").arms}
    for run_id, (label, seed) in wanted.items():
        with RunWriter(RunsRoot(folder / "runs").run(run_id)) as writer:
            writer.describe(Run(run_id, arms[label], seed).to_json(), {})


def test_labels_and_questions_are_shown_as_they_are_written(folder):
    (folder / "odd.yaml").write_text(
        "question: Does [1] help [/x]?\ninclude: [{label: 'a [red]b[/red] :100:', set: {train.lr: 2e-3}}]\n"
    )
    shown = cli("plan", "one.yaml", "--with", "odd.yaml", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Does [1] help [/x]?")
    assert "│ a [red]b[/red] :100: │" in shown.stdout


class TestPasswords:
    """A database's password is given to Optuna, and shown by no command."""

    URL = "nosuchdb://me:geheim@host/db"

    @pytest.fixture
    def searching(self, folder):
        text = SPEC.replace("axes: {regularizer.weight: {logspace: [0.1, 1, 3]}}\n", "")
        for name, trials in (("a", 5), ("b", 6)):
            search = (
                f"search: {{space: {{train.lr: {{log: [1e-4, 1e-3]}}}}, trials: {trials}, storage: '{self.URL}'}}\n"
            )
            (folder / f"{name}.yaml").write_text(text + search)
        return folder

    def test_they_are_read_as_they_are(self, searching):
        assert load_spec(searching / "a.yaml").search.storage == self.URL

    @pytest.mark.parametrize(
        ("words", "status", "shown"),
        [
            (("explain", "a.yaml", "search"), 0, "nosuchdb://me:***@host/db"),
            (("explain", "a.yaml", "search.storage", "--json"), 0, '"value": "nosuchdb://me:***@host/db"'),
            (("diff", "a.yaml", "b.yaml"), 1, "search.trials"),
            (("diff", "a.yaml", "one.yaml", "--json"), 1, '"a": "nosuchdb://me:***@host/db"'),
            (("plan", "a.yaml"), 2, "search.storage: Can't load plugin: sqlalchemy.dialects:nosuchdb"),
            (("sweep", "a.yaml"), 2, "search.storage: Can't load plugin: sqlalchemy.dialects:nosuchdb"),
            (("plan", "a.yaml", "--set", f"search.storage=[{URL}]"), 2, "got ['nosuchdb://me:***@host/db']"),
            (("plan", "a.yaml", "--set", f"search.storage:{URL}"), 2, "me:***@host/db: expected PATH=VALUE"),
            (("plan", "a.yaml", "--set", "search.storage", URL), 2, "extra argument(s) (nosuchdb://me:***@host/db)"),
        ],
    )
    def test_and_shown_nowhere(self, searching, words, status, shown):
        done = cli(*words, cwd=searching)
        assert done.returncode == status
        assert shown in (done.stderr if status == 2 else done.stdout)
        assert "geheim" not in done.stdout + done.stderr
