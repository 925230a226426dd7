"""Runs of a sweep that its spec no longer asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repa_lab.runs import RunsRoot, RunStatus


@dataclass(frozen=True)
class Orphan:
    """A run that an earlier version of the spec asked for and this one does not; it is listed and never deleted."""

    label: str
    seed: int
    run_id: str
    status: RunStatus

    def record(self) -> dict[str, Any]:
        """As plain data for the sweep's manifest."""
        return {"label": self.label, "seed": self.seed, "run_id": self.run_id}


def orphans_of(root: RunsRoot, name: str, asked: set[str]) -> tuple[Orphan, ...]:
    """Runs that the sweep's manifest knows from earlier versions of the spec and that are not asked for any more.

    The trials of a search are nobody's orphans: the spec asks for them without naming them.
    """
    directory = root.sweep(name)
    if not (directory.path / "sweep.json").is_file() or directory.manifest.get("search"):
        return ()
    manifest = directory.manifest
    known = [{"label": arm["label"], **run} for arm in manifest["arms"] for run in arm["runs"]] + manifest.get(
        "orphaned", []
    )
    left = {run["run_id"]: run for run in known if run["run_id"] not in asked}
    found = (Orphan(run["label"], run["seed"], run_id, root.run(run_id).status()) for run_id, run in left.items())
    return tuple(orphan for orphan in found if orphan.status is not RunStatus.NEW)
