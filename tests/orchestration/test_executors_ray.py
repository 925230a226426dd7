"""Sweeps on a real Ray cluster of several nodes on this machine: workers killed, nodes taken away."""

import signal
import subprocess
import sys

import pytest
import yaml

from repa_lab import plan, sweep
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import SpecError
from tests.faults.processes import holders, meanwhile, parent_of, signal_holders, steps_of, wait_until
from tests.training.conftest import assert_same, rows, weights

ray = pytest.importorskip("ray")
STEPS = 100
NAMESPACES = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)


def question(tiny, steps=STEPS, **options):
    run = {**tiny()["run"], "checkpoint_every": 10, **options}
    evaluate = {**tiny()["evaluate"], "every": steps}
    return tiny(train={**tiny()["train"], "steps": steps}, evaluate=evaluate, seeds=1, run=run)


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory):
    """What the sweep comes to on this machine."""
    root = tmp_path_factory.mktemp("local")
    assert sweep(question(tiny), root, workers=1).failures == {}
    return RunsRoot(root)


@pytest.fixture
def cluster():
    """A head that takes no runs, and two nodes of one slot each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.slots = [cluster.add_node(num_cpus=1, resources={"slot": 1}) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def on(cluster, **more):
    return {"executor": "ray", "ray": {"address": cluster.address, "resources": {"slot": 1}, **more}}


def assert_equal(root: RunsRoot, local: RunsRoot) -> None:
    """Weights and rows are bit for bit those of the local executor."""
    assert len(local.runs()) == 2
    for expected in local.runs():
        found = root.run(expected.run_id)
        assert found.state.state is State.DONE
        assert_same(weights(found), weights(expected))
        assert rows(found) == rows(expected)


def test_a_killed_worker_and_a_lost_node_change_no_bit(tiny, local, cluster, tmp_path):
    spec, root = question(tiny, **on(cluster)), RunsRoot(tmp_path)
    first, second = (root.run(run.run_id) for run in plan(spec, tmp_path).pending)

    def lose_node():
        wait_until(lambda: len(steps_of(second)) >= 15)
        (holder,) = holders(second)
        (lost,) = [node for node in cluster.slots if parent_of(holder) == node.all_processes["raylet"][0].process.pid]
        cluster.remove_node(lost, allow_graceful=False)

    damaging = [meanwhile(lose_node), meanwhile(lambda: signal_holders(first, signal.SIGKILL, after=15))]
    outcome = sweep(spec, tmp_path)
    for thread in damaging:
        thread.join()
    assert (outcome.trained, outcome.failures) == (2, {})
    for run in (first, second):
        assert any(event["event"] == "resumed" for event in run.events())
    assert_equal(root, local)
    assert not ray.is_initialized()


def refusal(spec, root) -> str:
    with pytest.raises(SpecError) as caught:
        sweep(spec, root)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix("<given>: ")


@pytest.mark.skipif(NAMESPACES.returncode != 0, reason="no mount namespaces here")
def test_a_node_that_does_not_see_the_runs_root_is_refused_by_name(tiny, cluster, tmp_path):
    """A node in a mount namespace of its own, where something else lies over the root."""
    root = tmp_path / "runs"
    root.mkdir()
    spec = question(tiny, **on(cluster, resources={"blind": 1}))
    none = "run.ray: no node of the Ray cluster has what a run takes: CPU 1, blind 1"
    assert refusal(spec, root) == none
    start = f"{sys.executable} -m ray.scripts.scripts start --block --address {cluster.address} --num-cpus 1"
    command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {root} && {start} --resources '{{\"blind\": 1}}'"]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while (line := refusal(spec, root)) == none:
            assert node.poll() is None  # until it has joined
        assert line.startswith("run.ray: node ")
        assert line.endswith(f"does not see the runs root {root}; it must be on shared storage")
        assert not (root / "by-id").exists()
    finally:
        node.terminate()
        node.wait()


def test_without_ray_it_says_what_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    expected = "run.executor: ray needs Ray: pip install 'repa-lab[ray]'"
    assert refusal(question(tiny, executor="ray"), tmp_path) == expected


@pytest.mark.slow
def test_a_cluster_is_started_where_none_is_named_and_gone_afterwards(tiny, local, tmp_path):
    outcome = sweep(question(tiny, executor="ray"), tmp_path)
    assert outcome.failures == {}
    assert_equal(RunsRoot(tmp_path), local)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1:1", "no Ray cluster at '127.0.0.1:1': Connection refused"),
        ("ray://head:10001", "'ray://head:10001' is neither auto nor host:port"),
    ],
)
def test_an_address_without_a_cluster_is_refused(tiny, tmp_path, address, problem):
    assert refusal(question(tiny, executor="ray", ray={"address": address}), tmp_path) == f"run.ray.address: {problem}"


@pytest.mark.slow
def test_several_processes_share_a_run_inside_a_task(tiny, local, tmp_path):
    outcome = sweep(question(tiny, executor="ray", gpus_per_run=2), tmp_path, workers=1)
    assert outcome.failures == {}
    for expected in local.runs():
        found = RunsRoot(tmp_path).run(expected.run_id)
        assert found.provenance["processes"] == 2
        for ours, theirs in zip(rows(found)[:5], rows(expected)[:5], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_an_interrupted_sweep_is_checkpointed_and_goes_on(tiny, tmp_path):
    """Of runs long enough to hear of it, for they look about once a second whether they should end."""
    file, root = tmp_path / "spec.yaml", RunsRoot(tmp_path / "runs")
    file.write_text(yaml.safe_dump(question(tiny, 6 * STEPS, executor="ray"), sort_keys=False))
    sweep(question(tiny, 6 * STEPS), tmp_path / "local", workers=1)
    command = [sys.executable, "-m", "repa_lab", "sweep", str(file), "--root", str(root.path), "--workers", "1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = root.run(plan(file, root.path).pending[0].run_id)
    wait_until(lambda: len(steps_of(run)) >= 13)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate()
    assert first.returncode == 130
    assert error.splitlines()[-1] == "interrupted; run the same command again to go on from the last checkpoints"
    assert run.state.state is State.INTERRUPTED
    stopped = run.state.step
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert [event["step"] for event in run.events() if event["event"] == "resumed"] == [stopped]
    assert_equal(root, RunsRoot(tmp_path / "local"))
