"""Warm worker processes: forked from one process that has imported the libraries and has touched no GPU.

Importing torch and its companions takes seconds of CPU; a fork takes milliseconds, and workers share the memory of the
libraries. The fork server has one thread, opens no file, database or connection, and loads no plugin; a worker does.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TextIO

_REAP_EVERY_S = 0.05
_WORK = "work"  # the argument of a process that is a worker
_IDLE_S = 300.0  # a notebook that does not sweep for so long gets the memory back


class WorkerProcess:
    """A worker process, seen from its scheduler; it may wait for its server to be ready.

    Attributes:
        server: the server that the worker is forked from.
        messages: where the worker's messages arrive.
    """

    def __init__(self, server: ForkServer, jobs: int, messages: int, status: int) -> None:
        self.server = server
        self.messages = Connection(messages, writable=False)
        self._jobs, self._status = Connection(jobs, readable=False), os.fdopen(status, "rb", 0)

    @cached_property
    def pid(self) -> int:
        """The process's id, once it has been forked; 0 if its server ended before."""
        return int(self._status.readline() or 0)

    def send(self, message: object) -> None:
        """Send a job, or a request to stop."""
        with suppress(BrokenPipeError):  # the process has died; its messages have ended
            self._jobs.send(message)

    def dismiss(self) -> None:
        """End the process's input, upon which the process ends."""
        self._jobs.close()

    def kill(self) -> None:
        """Kill the process and all that it has started, such as data loaders."""
        with suppress(ProcessLookupError):
            if self.pid:
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, patience_s: float | None = None) -> str | None:
        """Return how the process ended, empty if its server is gone; None if it has not within the patience."""
        if self.pid and not select.select([self._status], [], [], patience_s)[0]:
            return None
        status = self._status.readline()
        return _cause(int(status)) if status else ""

    def close(self) -> None:
        """Close the pipes."""
        self._jobs.close()
        self._status.close()
        self.messages.close()


class ForkServer:
    """The process that workers are forked from, seen from its scheduler.

    Args:
        environment: the environment of the server and its workers.
        log: the file to which the server writes its errors.
    """

    def __init__(self, environment: Mapping[str, str], log: TextIO) -> None:
        self._environment = dict(environment)
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is the scheduler's to handle
            )

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Return whether the server is there and has this environment."""
        return self._environment == environment and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether the server has imported the libraries, or has ended."""
        return self._process.poll() is not None or bool(select.select([self._requests], [], [], 0)[0])

    def fork(self, environment: Mapping[str, str], log: TextIO) -> WorkerProcess:
        """Have a worker forked as soon as the server is ready; a worker whose server has ended ends before it begins.

        Args:
            environment: variables that only this worker has.
            log: the file to which the worker writes its errors.
        """
        (jobs, ours), (messages, theirs), (status, servers) = os.pipe(), os.pipe(), os.pipe()
        with suppress(BrokenPipeError):
            socket.send_fds(self._requests, [b"f"], [jobs, theirs, log.fileno(), servers])
        for descriptor in (jobs, theirs, servers):
            os.close(descriptor)
        process = WorkerProcess(self, ours, messages, status)
        process.send((dict(environment), os.getcwd()))  # noqa: PTH109
        return process

    def close(self) -> str:
        """End the server, whose workers go on; return how it ended."""
        if not self.is_ready:  # its imports are for nothing
            self._process.kill()
        self._requests.close()
        return _cause(self._process.wait())


_server: ForkServer | None = None


def open_server(environment: Mapping[str, str], log: TextIO) -> ForkServer:
    """Return this process's server, which outlives a sweep; start another one if the environment has changed."""
    global _server  # noqa: PLW0603
    if _server is None or not _server.serves(environment):
        close_server()
        _server = ForkServer(environment, log)
    return _server


def close_server() -> None:
    """End this process's server, if there is one."""
    global _server  # noqa: PLW0603
    if _server is not None:
        _server.close()
    _server = None


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def serve(requests: socket.socket) -> bool:
    """Fork a worker for every request until the scheduler is gone, or has asked nothing for minutes.

    Returns:
        True in a worker, whose standard streams are then those of the request; False in the server at its end.
    """
    if sys.platform == "linux":  # elsewhere a fork is not safe once libraries are imported; see `main`
        # timm imports W&B where it can, and W&B makes a temporary folder at its import. Every worker would delete it at
        # its end, for all others too; so each worker that needs W&B imports it itself.
        sys.modules["wandb"] = None  # type: ignore[assignment]
        import repa_lab.orchestration.worker  # noqa: F401

        del sys.modules["wandb"]
    gc.freeze()  # collections must not visit, and so copy, the half a million objects of the libraries
    requests.send(b"r")
    statuses: dict[int, IO[bytes]] = {}  # a pipe for each worker
    while True:
        patience_s = _REAP_EVERY_S if statuses else _IDLE_S
        is_asked = bool(select.select([requests], [], [], patience_s)[0])
        if not is_asked and not statuses:
            return False
        for pid in list(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with suppress(BrokenPipeError), statuses.pop(pid) as pipe:
                    pipe.write(b"%d\n" % os.waitstatus_to_exitcode(status))
        if is_asked:
            message, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
            if not message:
                return False
            if (pid := os.fork()) == 0:
                requests.close()
                for pipe in statuses.values():
                    pipe.close()
                _take_over(descriptors)
                return True
            statuses[pid] = os.fdopen(descriptors.pop(), "wb")
            for descriptor in descriptors:
                os.close(descriptor)


def _take_over(descriptors: list[int]) -> None:
    """Make the standard streams of a process of its own from those of a request, and tell the process's id."""
    os.setsid()
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    os.write(descriptors[3], b"%d\n" % os.getpid())
    for descriptor in descriptors:
        os.close(descriptor)


def work() -> None:
    """Be a worker on copies of the standard streams.

    Libraries then print to standard error, and the processes that they start read nothing.
    """
    jobs, messages = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    environment, folder = jobs.recv()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(2, 1)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    from repa_lab.orchestration.worker import Worker  # torch must not be imported before it knows its GPU

    Worker(jobs, messages).serve()


def main() -> None:
    """Serve, and in a forked process be a worker: a new one if a library has touched a GPU while it was imported."""
    if sys.argv[1:] == [_WORK]:
        work()
    elif serve(socket.socket(fileno=0)):
        is_fit = sys.platform == "linux"
        if is_fit:
            import torch

            is_fit = not torch.cuda._is_in_bad_fork()
        if not is_fit:
            os.execv(sys.executable, [sys.executable, "-m", "repa_lab.orchestration.executors.forkserver", _WORK])
        work()
    gc.unfreeze()  # else libraries report leaks at the exit


if __name__ == "__main__":
    main()
