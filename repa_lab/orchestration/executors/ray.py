"""A Ray cluster: each run is a Ray task. A run whose worker or node is lost goes on from its last checkpoint."""

from __future__ import annotations

import importlib
import os
import socket
import time
from typing import Any

from repa_lab.orchestration.executors.detached import DetachedExecutor, SharedFolder, carry_out
from repa_lab.orchestration.scheduler import ExecutorError, Job, MessageKind, WorkerMessage
from repa_lab.runs import RunsRoot
from repa_lab.spec import RunOptions

_CHECK_PATIENCE_S = 120.0
_CONNECT_PATIENCE_S = 15.0


class RayExecutor(DetachedExecutor):
    """Runs as tasks of a Ray cluster: one that exists, or one on this machine for as long as the sweep goes on.

    Args:
        options: ``options.ray`` says where the cluster is and what a run takes of it.
        root: the runs root, which every node that can take a run must see.
        workers: the number of runs handed to the cluster at a time; None as many as fit now.

    Raises:
        ExecutorError: there is no Ray, no such cluster, no node that a run fits on, or a node that does not see the
            root.
    """

    def __init__(self, options: RunOptions, root: RunsRoot, sweep: str, workers: int | None) -> None:
        self._ray = _import_ray()
        self._options = options.ray
        super().__init__(SharedFolder.open(root, sweep), workers or 0)
        self._is_ours = not self._ray.is_initialized()
        requested = {"CPU": self._options.num_cpus, "GPU": self._options.num_gpus, **self._options.resources}
        self._request = {name: amount for name, amount in requested.items() if amount}
        try:
            _connect(self._ray, self._options.address)
            nodes = self._fitting_nodes()
            self._require_shared_root(nodes)
        except ExecutorError:
            self._disconnect()
            raise
        self.slots = workers or sum(map(self._capacity, nodes))
        demand = {"num_cpus": self._options.num_cpus, "num_gpus": self._options.num_gpus}
        self._task = self._ray.remote(carry_out).options(
            **demand, resources=dict(self._options.resources), max_retries=self._options.retries
        )

    def submit(self, job: Job) -> None:
        """Hand a job to the cluster."""
        self._shared.stop_file(job.name).unlink(missing_ok=True)
        self._handles[job.name] = self._task.remote(self._shared, self._shared.pack(job))

    def kill(self, run_id: str) -> None:
        """End a run at once, whatever it does."""
        if run_id in self._handles:
            self._ray.cancel(self._handles[run_id], force=True)

    def close(self) -> None:
        """Have the runs in hand checkpointed, and leave the cluster."""
        super().close()
        self._disconnect()

    def _wait(self, timeout: float) -> None:
        if tasks := list(self._handles.values()):
            self._ray.wait(tasks, timeout=timeout)
        else:
            time.sleep(timeout)

    def _outcome(self, name: str, handle: Any) -> WorkerMessage | None:
        if not self._ray.wait([handle], timeout=0)[0]:
            return None
        try:
            message: WorkerMessage = self._ray.get(handle)
            return message
        except self._ray.exceptions.RayError as error:
            return WorkerMessage(MessageKind.FAILED, name, f"Ray lost it ({type(error).__name__})")

    def _capacity(self, node: dict[str, Any]) -> int:
        """Return how many runs a node takes at a time."""
        shares = (node["Resources"].get(name, 0.0) // amount for name, amount in self._request.items())
        return int(min(shares, default=1))

    def _fitting_nodes(self) -> list[dict[str, Any]]:
        nodes = [node for node in self._ray.nodes() if node["Alive"] and self._capacity(node)]
        if not nodes:
            request = ", ".join(f"{name} {amount:g}" for name, amount in self._request.items())
            raise ExecutorError("ray", f"no node of the Ray cluster has what a run takes: {request}")
        return nodes

    def _require_shared_root(self, nodes: list[dict[str, Any]]) -> None:
        """Have every node look for the token, before anything is trained."""
        checks = {}
        for node in nodes:
            place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = self._ray.remote(SharedFolder.problem).options(num_cpus=0, scheduling_strategy=place)
            checks[task.remote(self._shared)] = f"node {node['NodeManagerAddress']}"
        for task, name in checks.items():
            try:
                problem = self._ray.get(task, timeout=_CHECK_PATIENCE_S)
            except self._ray.exceptions.RayError as error:
                reason = _lines(error)[-1].strip()
                raise ExecutorError("ray", f"{name} of the Ray cluster cannot run repa-lab: {reason}") from None
            if problem:
                raise ExecutorError("ray", f"{name} of the Ray cluster: {problem}")

    def _disconnect(self) -> None:
        if self._is_ours:
            self._ray.shutdown()


def _import_ray() -> Any:
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
    if address not in (None, "auto"):  # refused where nobody answers; Ray itself would try for minutes
        host, _, port = str(address).rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise ExecutorError("ray.address", f"'{address}' is neither auto nor host:port")
        try:
            socket.create_connection((host, int(port)), _CONNECT_PATIENCE_S).close()
        except OSError as error:
            raise ExecutorError("ray.address", f"no Ray cluster at '{address}': {error.strerror or error}") from None
    # A dashboard answers whoever reaches it (CVE-2023-48022): ours has none, and listens to this machine alone.
    ours = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **ours)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise ExecutorError("ray.address", f"no Ray cluster at '{address}': {_lines(error)[0]}") from None


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]
