"""Which settings a search tries around an arm, and whether they make a difference to it; imports no Optuna."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.spec import Arm, SpecError
from repa_lab.spec.expand import value_at
from repa_lab.spec.identity import identify
from repa_lab.spec.options import Interval

Space = Mapping[str, Interval]


def is_searched(arm: Arm, space: Space) -> bool:
    """Whether a searched field makes a difference to an arm: the weight makes none to a baseline without a regularizer."""
    own = _content(arm)
    return any(_content(one) != own for one in _corners(arm, space))


def _content(arm: Arm) -> str:
    """What tells the arm's runs from those of others, the files that it names taken by their names."""
    return identify(arm.config, 0, PROTOCOL_VERSION, str(arm.config.data), {}).run_id


def _corners(arm: Arm, space: Space) -> Iterator[Arm]:
    """The arm with each searched field at each of its ends; what is refused is told by :mod:`.problems`."""
    for dotted in space:
        for settings in ends(arm, space, dotted):
            try:
                yield arm.with_settings(settings)
            except SpecError:
                continue


def ends(arm: Arm, space: Space, dotted: str) -> Iterator[dict[str, Any]]:
    """A searched field at each of its choices, or at both ends of its range, with the settings under which it is drawn.

    Nothing where the arm's own settings never meet its conditions.
    """
    if all(own_value(arm, path) in allowed for path, allowed in _own_conditions(space, dotted)):
        needed = _needed(space, dotted)
        yield from ({**needed, dotted: value} for value in space[dotted].ends)


def own_value(arm: Arm, path: str) -> Any:
    """What an arm has at a dotted path before anything is drawn."""
    return value_at(arm.asked.model_dump(mode="json"), tuple(path.split(".")))


def _needed(space: Space, dotted: str) -> dict[str, Any]:
    """Settings of fields that are drawn before, under which a field is searched."""
    settings: dict[str, Any] = {}
    for path, allowed in space[dotted].conditions.items():
        if path in space and (fitting := [value for value in allowed if space[path].takes(value)]):
            settings |= {**_needed(space, path), path: fitting[0]}
    return settings


def _own_conditions(space: Space, dotted: str) -> Iterator[tuple[str, list[Any]]]:
    for path, allowed in space[dotted].conditions.items():
        if path not in space:
            yield path, allowed
        elif any(space[path].takes(value) for value in allowed):
            yield from _own_conditions(space, path)
