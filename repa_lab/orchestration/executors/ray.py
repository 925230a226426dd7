"""A Ray cluster: each run is a task of it. What is lost with a worker or a node starts again from its last checkpoint."""

from __future__ import annotations

import importlib
import os
import socket
import time
from typing import Any

from repa_lab.orchestration.executors import ExecutorError
from repa_lab.orchestration.executors.detached import Shared, carry_out, failure, unshared
from repa_lab.orchestration.jobs import Job, Report, TrainJob
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import RunOptions

_CLOSE_PATIENCE_S = 90.0
_CHECK_PATIENCE_S = 120.0
_CONNECT_PATIENCE_S = 15.0


class RayExecutor:
    """Runs as tasks of a cluster, which is connected to, or started on this machine for as long as the sweep goes on.

    Args:
        options: ``ray`` says where the cluster is and what a run takes of it.
        root: the runs root, which every node that can take a run must see.
        group: the sweep's name.
        workers: how many runs are handed to the cluster at a time; None as many as fit now.

    Raises:
        ExecutorError: there is no Ray, no such cluster, no node that a run fits on, or a node that does not see the
            root.
    """

    def __init__(self, options: RunOptions, root: RunsRoot, group: str, workers: int | None) -> None:
        self._ray = _import()
        self._options = options
        self._shared = Shared.open(root, group)
        self._jobs: dict[Any, Job] = {}
        self._is_ours = not self._ray.is_initialized()
        try:
            _connect(self._ray, options.ray.address)
            nodes = self._fitting_nodes()
            self._check(nodes)
        except ExecutorError:
            self._disconnect()
            raise
        self._slots = workers or sum(_fits(node, self._request()) for node in nodes)
        self._task = self._ray.remote(carry_out).options(**self._demand(), max_retries=options.ray.retries)

    @property
    def slots(self) -> int:
        """See :class:`Executor`."""
        return self._slots

    def free(self) -> int:
        """See :class:`Executor`."""
        return self._slots - len(self._jobs)

    def submit(self, job: Job) -> None:
        """See :class:`Executor`."""
        if isinstance(job, TrainJob):
            self._shared.retract(job.run.run_id)
        self._jobs[self._task.remote(self._shared, self._shared.job(job))] = job

    def stop(self, run_id: str, state: State) -> None:
        """See :class:`Executor`."""
        self._shared.ask(run_id, state)

    def kill(self, run_id: str) -> None:
        """See :class:`Executor`."""
        for task, job in self._jobs.items():
            if isinstance(job, TrainJob) and job.run.run_id == run_id:
                self._ray.cancel(task, force=True)

    def withdraw(self) -> list[str]:
        """See :class:`Executor`; what Ray keeps waiting for a place will be started."""
        return []

    def poll(self, timeout: float) -> list[Report]:
        """See :class:`Executor`."""
        if not self._jobs:
            time.sleep(timeout)
            return []
        tasks = list(self._jobs)
        self._ray.wait(tasks, num_returns=1, timeout=timeout)
        done, _ = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)
        return [self._outcome(task, self._jobs.pop(task)) for task in done]

    def close(self) -> None:
        """See :class:`Executor`."""
        running = [job.run.run_id for job in self._jobs.values() if isinstance(job, TrainJob)]
        for run_id in running:
            self._shared.ask(run_id, State.INTERRUPTED)
        if self._jobs:
            self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=_CLOSE_PATIENCE_S)
        for run_id in running:
            self._shared.retract(run_id)
        self._disconnect()

    def _outcome(self, task: Any, job: Job) -> Report:
        try:
            report = Report.from_json(self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            report = failure(job, f"Ray lost it ({type(error).__name__})")
        if isinstance(job, TrainJob):
            self._shared.retract(job.run.run_id)
        return report

    def _demand(self) -> dict[str, Any]:
        ray = self._options.ray
        return {"num_cpus": ray.num_cpus, "num_gpus": ray.num_gpus, "resources": dict(ray.resources)}

    def _request(self) -> dict[str, float]:
        """What a run takes, by the names of a node's resources."""
        ray = self._options.ray
        wanted = {"CPU": ray.num_cpus, "GPU": ray.num_gpus, **ray.resources}
        return {name: amount for name, amount in wanted.items() if amount}

    def _fitting_nodes(self) -> list[dict[str, Any]]:
        nodes = [node for node in self._ray.nodes() if node["Alive"] and _fits(node, self._request())]
        if not nodes:
            wanted = ", ".join(f"{name} {amount:g}" for name, amount in self._request().items())
            raise ExecutorError("ray", f"no node of the Ray cluster has what a run takes: {wanted}")
        return nodes

    def _check(self, nodes: list[dict[str, Any]]) -> None:
        """Have every node look for our token, before anything is trained."""
        asked = {}
        for node in nodes:
            place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = self._ray.remote(unshared).options(num_cpus=0, scheduling_strategy=place)
            asked[task.remote(self._shared.token_path, self._shared.token)] = f"node {node['NodeManagerAddress']}"
        for task, name in asked.items():
            try:
                problem = self._ray.get(task, timeout=_CHECK_PATIENCE_S)
            except self._ray.exceptions.RayError as error:
                raise ExecutorError(
                    "ray", f"{name} of the Ray cluster cannot run repa-lab: {_last_line(error)}"
                ) from None
            if problem:
                raise ExecutorError("ray", f"{name} of the Ray cluster: {problem}")

    def _disconnect(self) -> None:
        if self._is_ours:
            self._ray.shutdown()


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.util.scheduling_strategies")
    except ImportError:
        raise ExecutorError("executor", "ray needs Ray: pip install 'repa-lab[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    if address not in (None, "auto"):
        _require_listener(str(address))
    # A dashboard answers whoever reaches it (CVE-2023-48022): ours has none, and listens to this machine alone.
    ours = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **ours)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise ExecutorError("ray.address", f"no Ray cluster at '{address}': {_first_line(error)}") from None


def _require_listener(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        ExecutorError: this is no ``host:port``, or nobody answers there.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ExecutorError("ray.address", f"'{address}' is neither auto nor host:port")
    try:
        socket.create_connection((host, int(port)), _CONNECT_PATIENCE_S).close()
    except OSError as error:
        raise ExecutorError("ray.address", f"no Ray cluster at '{address}': {error.strerror or error}") from None


def _fits(node: dict[str, Any], request: dict[str, float]) -> int:
    """How many runs a node takes at a time."""
    return int(min((node["Resources"].get(name, 0.0) // amount for name, amount in request.items()), default=1))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
