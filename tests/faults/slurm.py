"""A real Slurm of one node on this machine, without systemd and cgroups, for as long as tests need it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.processes import wait_until

CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def is_up() -> bool:
    """Whether a Slurm answers here."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True, check=False)
        return done.returncode == 0 and "idle" in done.stdout
    return False


def can_start() -> bool:
    """Whether :func:`started` can give one."""
    tools = ("sbatch", "slurmctld", "slurmd", "munged")
    return os.geteuid() == 0 and all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in tools)


@contextmanager
def started(folder: Path) -> Iterator[None]:
    """Start munge and Slurm; ``SLURM_CONF`` points to it meanwhile."""
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    controller, node = _free_ports(2)
    conf.write_text(CONF.format(host=host, folder=folder, controller=controller, node=node, cpus=os.cpu_count()))
    for name in ("spool", "state"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(conf)
    munge = _munge()
    try:
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([f"/usr/sbin/{daemon}", "-f", str(conf)], check=True)
        wait_until(is_up)
        yield
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True, check=False)
        # Else what carries out a job would outlive the daemons.
        wait_until(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, check=False).stdout)
        for daemon in ("slurmd", "slurmctld"):
            with suppress(OSError, ValueError):
                os.kill(int((folder / f"{daemon}.pid").read_text()), signal.SIGTERM)
        if munge:
            munge.terminate()
            munge.wait()
        del os.environ["SLURM_CONF"]


def _munge() -> subprocess.Popen[bytes] | None:
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return None
    for place in ("/run/munge", "/var/log/munge", "/var/lib/munge", "/etc/munge"):
        Path(place).mkdir(parents=True, exist_ok=True)
        shutil.chown(place, "munge", "munge")
    shutil.chown("/etc/munge/munge.key", "munge", "munge")
    command = ["/usr/sbin/munged", "--foreground"]
    daemon = subprocess.Popen(
        command, user="munge", group="munge", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    answers = ["munge", "-n"]
    wait_until(lambda: subprocess.run(answers, capture_output=True, check=False).returncode == 0)
    return daemon


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
