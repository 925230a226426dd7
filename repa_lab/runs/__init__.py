"""Run and sweep directories: their layout, states, metric rows and manifests; the one reader and the one writer."""

from repa_lab.runs.directory import RunDirectory, RunState, RunStatus, RunWriter, State
from repa_lab.runs.root import RunsRoot, SweepDirectory, SweepManifest

__all__ = [
    "RunDirectory",
    "RunState",
    "RunStatus",
    "RunWriter",
    "RunsRoot",
    "State",
    "SweepDirectory",
    "SweepManifest",
]
