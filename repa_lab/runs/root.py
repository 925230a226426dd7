"""Where runs live.

runs/
  by-id/<run_id>/      every run, once, whichever sweeps ask for it
  <sweep name>/        a sweep: its arms, its report, its search's database, and links to its runs
  cache/               encoder features, latents, reference statistics
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_lab.runs import files
from repa_lab.runs.directory import RunDirectory

DEFAULT_ROOT = Path("runs")
RESERVED = ("by-id", "cache")
_MAX_LABEL = 50
_STOP = "stop"


class UnknownSweepError(ValueError):
    """There is no such sweep."""


class UnknownRunError(ValueError):
    """There is no run of this id."""


class SweepDirectory:
    """A sweep's folder: which arms and runs it asked for, and the report on them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def root(self) -> RunsRoot:
        """The runs root this sweep stands in."""
        return RunsRoot(self.path.parent)

    @property
    def lock(self) -> Path:
        """The file that whoever carries out the sweep holds."""
        return self.path / ".lock"

    @property
    def is_held(self) -> bool:
        """Whether a process carries out the sweep at the moment."""
        return files.is_locked(self.lock)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether somebody wants whoever carries out the sweep to end."""
        return (self.path / _STOP).exists()

    def ask_to_stop(self, ask: bool = True) -> None:
        """Want it, or no longer."""
        (self.path / _STOP).touch() if ask else (self.path / _STOP).unlink(missing_ok=True)

    @property
    def manifest(self) -> dict[str, Any]:
        """Name, question, comparison and arms with their runs, as :meth:`record` was given.

        Raises:
            DamagedFileError: it cannot be read.
        """
        value = files.read_object(self.path / "sweep.json")
        if not isinstance(value.get("arms"), list):
            raise files.DamagedFileError(f"'{self.path / 'sweep.json'}' is damaged: it has no arms")
        return value

    def record(self, manifest: Mapping[str, Any]) -> None:
        """Write what the sweep asks for, and a link per run under a name that a person can read."""
        files.write_json(self.path / "sweep.json", dict(manifest))
        links = self.path / "runs"
        links.mkdir(exist_ok=True)
        for old in links.iterdir():
            old.unlink()
        for arm in manifest["arms"]:
            for run in arm["runs"]:
                target = os.path.relpath(self.root.run(run["run_id"]).path, links)
                link = links / _link_name(arm["label"], run["seed"])
                if (
                    link.is_symlink() and str(link.readlink()) != target
                ):  # labels that differ in what a file name cannot say
                    link = link.with_name(f"{link.name}-{run['run_id']}")
                if not link.is_symlink():
                    link.symlink_to(target)


class RunsRoot:
    """The folder that holds all runs, sweeps and caches; every path below it is made here, and none leads out of it.

    Raises:
        ValueError: for the name of a run or a sweep that is not the name of a folder, such as ``../x``.
    """

    def __init__(self, path: Path = DEFAULT_ROOT) -> None:
        self.path = path

    @property
    def cache(self) -> Path:
        """Folder of what can be computed again."""
        return self.path / "cache"

    def run(self, run_id: str) -> RunDirectory:
        """The directory of a run, there or not."""
        return RunDirectory(self.path / "by-id" / _folder_name(run_id))

    def find_run(self, name: Path) -> RunDirectory:
        """A described run by its id, or by its folder or a link to it.

        Raises:
            UnknownRunError: there is no such run.
        """
        for path in (name, self.path / "by-id" / name):
            if (path / "spec.json").is_file():
                return RunDirectory(path.resolve())
        raise UnknownRunError(f"no run '{name}' in {self.path}; `repa-lab status` lists them")

    def runs(self) -> list[RunDirectory]:
        """All runs that were ever described."""
        return [RunDirectory(path.parent) for path in sorted(self.path.glob("by-id/*/spec.json"))]

    def sweep(self, name: str) -> SweepDirectory:
        """The directory of a sweep, there or not."""
        return SweepDirectory(self.path / _folder_name(name))

    def find_sweep(self, name: Path) -> SweepDirectory:
        """A recorded sweep by its name or by its folder.

        Raises:
            UnknownSweepError: naming the sweeps that there are.
        """
        for path in (name, self.path / name):
            if (path / "sweep.json").is_file():
                return SweepDirectory(path)
        known = ", ".join(directory.path.name for directory in self.sweeps()) or "none"
        raise UnknownSweepError(f"no sweep '{name}' in {self.path}; there are: {known}")

    def sweeps(self) -> list[SweepDirectory]:
        """All sweeps that were ever recorded."""
        return [SweepDirectory(path.parent) for path in sorted(self.path.glob("*/sweep.json"))]


def _folder_name(name: str) -> str:
    if not name or name.startswith(".") or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r} cannot be the name of a run or a sweep")
    return name


def _link_name(label: str, seed: int) -> str:
    readable = "".join(character if character.isalnum() or character in "._-=" else "_" for character in label)
    return f"{readable[:_MAX_LABEL]}-seed{seed}"
