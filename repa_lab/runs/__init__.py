"""The run directory and nothing else: its layout, states, metric rows and provenance; the one reader and the one writer."""

from repa_lab.runs.directory import RunDirectory, RunWriter
from repa_lab.runs.root import RunsRoot, SweepDirectory
from repa_lab.runs.state import RunState, RunStatus, State

__all__ = ["RunDirectory", "RunState", "RunStatus", "RunWriter", "RunsRoot", "State", "SweepDirectory"]
