"""Trials read back from run directories, which are the truth: for a study that was lost, or one whose space has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from repa_lab.orchestration.search.group import Group
from repa_lab.orchestration.search.space import Settings, Space
from repa_lab.runs import RunDirectory, RunsRoot, RunStatus, State
from repa_lab.runs.files import DamagedFileError
from repa_lab.spec import Arm, SpecError
from repa_lab.spec.expand import value_at

# What any two trials of a search share unless it is searched; a look at these spares most runs of a root the rest.
_SHARED = ("model", "train")
Grouping = Callable[[Arm], Group]


@dataclass(frozen=True)
class Found:
    """A setting of the space of which there are runs."""

    settings: Settings
    group: Group
    begun_at: str


def find_groups(root: RunsRoot, arm: Arm, space: Space, grouping: Grouping, begun: Set[str]) -> list[Found]:
    """Every setting of the space whose runs are to be had, in the order in which they were begun.

    Args:
        root: the runs root.
        arm: what is not searched.
        space: what is.
        grouping: the runs of an arm's seeds, with nothing known of them yet.
        begun: ids of runs that this search has begun.

    Returns:
        Settings whose runs have all ended, whoever trained them, and those that this search began or that were
        interrupted, which are to be completed.
    """
    known: dict[str, Group] = {}
    found: dict[tuple[str, ...], Found] = {}
    for run, settings in _candidates(root, arm, space):
        group = _grouped(known, settings, space, grouping)
        if group is not None and run.run_id in group.runs and group.key not in found:
            group.absorb(group.runs)
            if group.is_settled or any(_goes_on(root.run(run_id), begun) for run_id in group.runs):
                found[group.key] = Found(settings, group, _time(run))
    return sorted(found.values(), key=lambda one: (one.begun_at, one.group.key))


def _candidates(root: RunsRoot, arm: Arm, space: Space) -> Iterator[tuple[RunDirectory, Settings]]:
    own = arm.config.model_dump(mode="json")
    for run in root.runs():
        spec = run.spec
        settings = space.of_run(spec)
        if settings is not None and _is_alike(own, spec, settings):
            yield run, settings


def _is_alike(own: Mapping[str, Any], spec: Mapping[str, Any], searched: Iterable[str]) -> bool:
    searched = set(searched)
    for section in _SHARED:
        for name, value in own[section].items():
            path = f"{section}.{name}"
            varies = any(one == path or one.startswith(f"{path}.") for one in searched) or section in searched
            # A folder may have been moved: only its content counts, which the run's id tells.
            if not varies and name != "pretrained" and value_at(spec, (section, name)) not in (None, value):
                return False
    return True


def _grouped(known: dict[str, Group], settings: Settings, space: Space, grouping: Grouping) -> Group | None:
    key = json.dumps(settings, sort_keys=True)
    if key not in known:
        try:
            known[key] = grouping(space.arm(settings))
        except SpecError:
            return None
    return known[key]


def _goes_on(run: RunDirectory, begun: Set[str]) -> bool:
    """Whether a run makes its group one to complete; a running one may be another sweep's."""
    status = run.status()
    return status in (RunStatus.RESUMABLE, RunStatus.FAILED) or (run.run_id in begun and status is not RunStatus.NEW)


def is_wanted_again(run: RunDirectory) -> bool:
    """Whether somebody wants a run taken up again that had ended: `repa-lab retry` says so in its history."""
    return run.state.state is State.NEW and [event["event"] for event in run.events()][-1:] == [State.NEW.value]


def _time(run: RunDirectory) -> str:
    try:
        return str(run.provenance.get("time", ""))
    except (OSError, DamagedFileError):
        return ""


def run_ids(manifest: Mapping[str, Any]) -> frozenset[str]:
    """The runs that a sweep's manifest names."""
    return frozenset(run["run_id"] for arm in manifest.get("arms", []) for run in arm["runs"])
