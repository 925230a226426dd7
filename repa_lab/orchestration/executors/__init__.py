"""Where runs are trained: in worker processes on this machine, on a Ray cluster, or in Slurm's queue.

Here is what they share: how launchers, such as torchrun, tell the processes of one run of each other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from repa_lab.errors import InputError

if TYPE_CHECKING:
    from repa_lab.spec import RunOptions

_LAUNCHER_VARIABLES = {  # of torchrun, accelerate launch, MPI and Slurm
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED",
}  # fmt: skip
_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "SLURM_",
    "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "MPI_LOCAL",
)  # fmt: skip
_DECISIVE = ("RANK", "WORLD_SIZE", "PMI_SIZE", "MASTER_ADDR")  # ends of the names that accelerate reads
_JOIN_PATIENCE_S = 5.0

_log = logging.getLogger(__name__)


def launcher_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables by which a launcher tells a process that it is one of several."""
    return [name for name in environment if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES)]


class LauncherError(InputError):
    """The processes that the environment announces do not find each other."""


def join_processes(options: RunOptions) -> None:
    """Join the other processes of a run, and say so, if variables of a launcher make this process one of several.

    Raises:
        LauncherError: a process does not come, or the variables contradict each other.
    """
    from accelerate import PartialState
    from accelerate.utils.environment import get_cpu_distributed_information

    from repa_lab.training.device import is_on_cpu

    names = ", ".join(name for name in launcher_variables(os.environ) if name.endswith(_DECISIVE))
    try:
        place = get_cpu_distributed_information()
        own = f"process {place.rank} of {place.world_size}"
        if place.rank == 0 and place.world_size > 1:
            _log.warning("%s make this %s; unset them to train in one process", names, own)
        waiting = threading.Timer(_JOIN_PATIENCE_S, _log.warning, [f"{own} waits for the others ({names})"])
        waiting.daemon = True
        waiting.start()
        try:
            PartialState(cpu=is_on_cpu(options))
        finally:
            waiting.cancel()
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LauncherError(f"{reason}; unset {names} to train in one process") from None
