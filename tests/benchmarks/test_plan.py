"""How long a plan takes. Prints; asserts nothing about time."""

import time

import pytest

from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.display import as_json
from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot, State, files
from repa_lab.spec import load_spec

pytestmark = pytest.mark.bench
SPEC = {
    "name": "many",
    "model": {"family": "sit", "size": "nano/2"},
    "regularizer": {"type": "repa", "encoder": {"name": "efficientnet_lite0", "image_size": 64}},
    "data": {"source": "digits"},
    "train": {"steps": 10},
    "evaluate": {"extractor": {"name": "efficientnet_lite0"}},
}


@pytest.mark.parametrize(("arms", "seeds", "started"), [(1000, 10, 0), (10_000, 1, 0), (1000, 10, 10_000)])
def test_ten_thousand_runs(tmp_path, arms, seeds, started):
    root, marks = RunsRoot(tmp_path), [time.perf_counter()]
    spec = load_spec({**SPEC, "axes": {"regularizer.weight": [i / 1000 for i in range(1, arms + 1)]}, "seeds": seeds})
    if started:
        for entry in make_plan(spec, root).runs[:started]:
            write(root, entry.run)
    marks = [time.perf_counter()]
    spec = load_spec({**SPEC, "axes": {"regularizer.weight": [i / 1000 for i in range(1, arms + 1)]}, "seeds": seeds})
    marks.append(time.perf_counter())
    plan = make_plan(spec, root)
    marks.append(time.perf_counter())
    found = estimate(plan)
    marks.append(time.perf_counter())
    shown = as_json(found)
    marks.append(time.perf_counter())
    assert len(shown["runs"]) == 10_000
    parts = ", ".join(
        f"{name} {after - before:.2f} s"
        for name, before, after in zip(("read", "plan", "estimate", "JSON"), marks, marks[1:], strict=False)
    )
    print(f"\n{arms:,} arms x {seeds} seeds, {started:,} done: {marks[-1] - marks[0]:.2f} s in all ({parts})")


def write(root, run):
    """A finished run, its files as small as they can be."""
    directory = root.run(run.run_id)
    directory.path.mkdir(parents=True)
    files.write_record(directory.path / "state.json", {"state": State.DONE, "step": 10, "error": None})
    files.write_record(directory.path / "spec.json", {})
