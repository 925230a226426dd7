"""Where runs and sweeps are stored.

runs/
  by-id/<run_id>/      every run, once, whichever sweeps ask for it
  <sweep name>/        a sweep: its manifest, its report, its search's database, and links to its runs
  cache/               encoder features, latents, reference statistics

The root and its cache may be symbolic links. Nothing is changed behind any other link: that belongs to someone else.
A copy that followed the links (``scp -r``, ``rsync -L``, ``zip``) has copies of runs in their place. A run that has no
directory below ``by-id`` is found there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from repa_lab.errors import InputError
from repa_lab.runs import files
from repa_lab.runs.directory import RunDirectory

DEFAULT_ROOT = Path("runs")
_RUNS = "by-id"
RESERVED = (_RUNS, "cache")
_MAX_LABEL = 50


class RootError(InputError):
    """The root of all runs is not a folder."""


class UnknownSweepError(InputError):
    """No sweep has this name."""


class UnknownRunError(InputError):
    """No run has this id."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunRecord(_Record):
    """A run of an arm."""

    seed: int
    run_id: str


class ArmRecord(_Record):
    """An arm of a sweep, or a trial of its search."""

    label: str  # the arm's name in the report
    levels: dict[str, str] = {}  # the arm's level on every axis
    baseline: str | None = None  # label of the matched baseline
    unmatched: str = ""  # why there is no baseline; empty for baselines and trials
    runs: tuple[RunRecord, ...]  # one per seed


class OrphanRecord(RunRecord):
    """A run that an earlier version of the spec asked for and the present one does not."""

    label: str


class ObjectiveRecord(_Record):
    """A metric by its full name, or a cost, and whether small or large values are good."""

    metric: str
    goal: Literal["min", "max"] = "min"


class ComparisonRecord(ObjectiveRecord):
    """What a sweep compares; ``targets`` are values of metrics to reach, by full name."""

    targets: dict[str, list[float]] = {}


class TrialRecord(_Record):
    """A trial of a search."""

    arm: str  # label of the trial's arm
    state: Literal["waiting", "running", "complete", "pruned", "diverged", "failed", "repeated"]
    value: float | None = None  # mean of the searched metric over the seeds; None before the trial is complete
    params: dict[str, Any]  # the searched settings, by dotted path
    values: dict[str, float] = {}  # mean of every objective over the seeds; empty before the trial is complete


class SearchRecord(ObjectiveRecord):
    """The search of a sweep."""

    trials: tuple[TrialRecord, ...]  # every setting that was tried or waits, and every repeated draw; oldest first
    exhausted: dict[str, int] = {}  # the number of settings, by label of the arm around which no other is left to try
    objectives: tuple[ObjectiveRecord, ...]  # the searched metric and the costs
    pareto: tuple[str, ...] = ()  # with several objectives, labels of the trials on the Pareto front


class TrackingRecord(_Record):
    """What W&B is told of a sweep's runs; the fields are those of ``run.wandb``, with ``auto`` resolved."""

    mode: str = "offline"
    project: str = "repa-lab"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    artifacts: Literal[False, "final"] = False


class SweepManifest(_Record):
    """What a sweep asks for, as its ``sweep.json`` holds it; a search records its trials as arms."""

    name: str
    question: str = ""
    seeds: tuple[int, ...] = ()
    compare: ComparisonRecord
    arms: tuple[ArmRecord, ...]
    search: SearchRecord | None = None
    orphaned: tuple[OrphanRecord, ...] = ()
    wandb: TrackingRecord = TrackingRecord()

    @property
    def run_ids(self) -> list[str]:
        """The ids of all runs, arm by arm."""
        return [run.run_id for arm in self.arms for run in arm.runs]

    @property
    def link_names(self) -> dict[str, str]:
        """The names of the links to the runs, each with the run's id."""
        names: dict[str, str] = {}
        for arm in self.arms:
            readable = "".join(letter if letter.isalnum() or letter in "._-=" else "_" for letter in arm.label)
            for run in arm.runs:
                name = f"{readable[:_MAX_LABEL]}-seed{run.seed}"
                if names.get(name, run.run_id) != run.run_id:  # two labels give one file name
                    name = f"{name}-{run.run_id}"
                names[name] = run.run_id
        return names


class SweepDirectory:
    """A sweep's folder: which arms and runs it asks for, and the report on them.

    Attributes:
        path: the folder, which need not exist.
        lock: the file that the process that carries out the sweep holds.
        study: the file of the search's Optuna database.
        links: the folder of the links to the runs.
        stop: the file that exists while a graceful stop is requested.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"
        self.study = path / "study.db"
        self.links = path / "runs"
        self.stop = path / "stop"
        self._manifest = path / "sweep.json"

    @cached_property
    def root(self) -> RunsRoot:
        """The runs root that holds this sweep; where the folder is a link, the root that the link leads to."""
        is_plain = self.path.name not in ("", "..") and not self.path.is_symlink()
        return RunsRoot((self.path if is_plain else self.path.resolve()).parent)

    @property
    def is_held(self) -> bool:
        """Whether a process carries out the sweep at the moment."""
        return files.is_locked(self.lock)

    @property
    def is_recorded(self) -> bool:
        """Whether the sweep has a manifest."""
        return self._manifest.is_file()

    @property
    def manifest(self) -> SweepManifest:
        """What the sweep asks for; a manifest that cannot be read is refused with the place of the first error."""
        fields = files.read_record(self._manifest)
        try:
            return SweepManifest.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise files.DamagedFileError(f"'{self._manifest}' is damaged: {place}: {first['msg']}") from None

    def record(self, manifest: SweepManifest) -> None:
        """Write the manifest, and a link to every run under a readable name, unless a copy of the run has the name.

        Raises:
            LinkError: the folder, or that of the links, is itself a link.
        """
        files.require_no_links(self.path, self.links)
        files.write_record(self._manifest, manifest.model_dump(mode="json"))
        self.links.mkdir(exist_ok=True)
        for old in self.links.iterdir():
            if old.is_symlink():
                old.unlink()
        for name, run_id in manifest.link_names.items():
            if not (link := self.links / name).exists():
                link.symlink_to(os.path.relpath(self.root.place_of(run_id), self.links))

    def run(self, run_id: str) -> RunDirectory:
        """Return the directory of a run, as :meth:`RunsRoot.run`, or else a copy in this folder."""
        run = self.root.run(run_id)
        copy = None if os.path.lexists(run.path) else self.copies.get(run_id)
        return RunDirectory(copy, run_id) if copy else run

    @cached_property
    def copies(self) -> dict[str, Path]:
        """The copies of runs that stand in the place of links, by the runs' ids in the manifest; none behind a link."""
        if self.path.is_symlink() or self.links.is_symlink() or not self.links.is_dir():
            return {}
        with os.scandir(self.links) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        names: Mapping[str, str] = self.manifest.link_names if folders and self.is_recorded else {}
        paths = {names[folder]: self.links / folder for folder in folders if folder in names}
        return {run_id: path for run_id, path in paths.items() if (path / "spec.json").is_file()}


class RunsRoot:
    """The folder that holds all runs, sweeps and caches; no path that it gives leads out of it.

    Attributes:
        path: the folder, which need not exist.
        cache: the folder of the caches, which can be computed again.

    Raises:
        RootError: the path is that of a file.
        ValueError: for the name of a run or a sweep that is not the name of a folder, such as ``../x``.
    """

    def __init__(self, path: Path = DEFAULT_ROOT) -> None:
        if path.exists() and not path.is_dir():
            raise RootError(f"'{path}' is a file; the root of all runs is a folder")
        self.path = path
        self.cache = path / "cache"
        self._runs = path / _RUNS

    def place_of(self, run_id: str) -> Path:
        """Return where a run is trained."""
        return self._runs / _folder_name(run_id)

    def run(self, run_id: str) -> RunDirectory:
        """Return the directory of a run, which need not exist; where it is trained, or else a copy of it."""
        place = self.place_of(run_id)
        copy = None if os.path.lexists(place) else self._copies.get(run_id)
        return RunDirectory(copy or place, run_id)

    def find_run(self, name: Path) -> RunDirectory:
        """Return a described run by its id, its folder, or a link to its folder, or raise UnknownRunError."""
        if (name / "spec.json").is_file():
            return run_at(name)
        with suppress(ValueError):
            if ((run := self.run(str(name))).path / "spec.json").is_file():
                return run
        raise UnknownRunError(f"no run '{name}' in {self.path}; `repa-lab status` lists them")

    def runs(self) -> list[RunDirectory]:
        """Return all runs that were ever described."""
        described = [RunDirectory(self._runs / name) for name in _folders_with("spec.json", self._runs)]
        known = {run.run_id for run in described}
        return described + [self.run(run_id) for run_id in self._copies if run_id not in known]

    def adopt_copies(self) -> None:
        """Move the runs of which there are only copies to where they are trained."""
        for run_id, path in self._copies.items():
            if not os.path.lexists(place := self.place_of(run_id)):
                place.parent.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # another sweep has moved it
                    path.rename(place)

    @cached_property
    def _copies(self) -> dict[str, Path]:
        """Copies of runs in the folders of sweeps, by the runs' ids; a folder of another name is somebody's backup."""
        copies: dict[str, Path] = {}
        for sweep in self.sweeps():
            with suppress(files.DamagedFileError):  # the other sweeps can be read
                if sweep.copies and sweep.manifest.name == sweep.path.name:
                    copies = sweep.copies | copies
        return copies

    def sweep(self, name: str) -> SweepDirectory:
        """Return the directory of a sweep, which need not exist."""
        return SweepDirectory(self.path / _folder_name(name))

    def find_sweep(self, name: Path) -> SweepDirectory:
        """Return a recorded sweep by its name or its folder, or raise UnknownSweepError with the names."""
        for path in (name, self.path / name):
            if (sweep := SweepDirectory(path)).is_recorded:
                return sweep
        known = ", ".join(directory.path.name for directory in self.sweeps()) or "none"
        raise UnknownSweepError(f"no sweep '{name}' in {self.path}; there are: {known}")

    def sweeps(self) -> list[SweepDirectory]:
        """Return all sweeps that were ever recorded."""
        return [SweepDirectory(self.path / name) for name in _folders_with("sweep.json", self.path)]


def run_at(path: Path) -> RunDirectory:
    """Return the run whose folder this is, or whose link or copy in the folder of a sweep with a readable manifest."""
    place = path.absolute()  # not resolved: a link below `by-id` stays one
    sweep = SweepDirectory(place.parent.parent)
    if place.parent == sweep.links and sweep.is_recorded and (run_id := sweep.manifest.link_names.get(place.name)):
        return sweep.run(run_id)
    return RunDirectory(place if place.parent.name == _RUNS else place.resolve())


def _folders_with(file: str, parent: Path) -> list[str]:
    """Return the names of the folders in a folder, which need not exist, that hold a file of this name; sorted."""
    return [name for name in files.names_in(parent) if os.path.exists(f"{parent}/{name}/{file}")]  # noqa: PTH110


def _folder_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} cannot be the name of a run or a sweep")
    return name
