"""A SimpleTuner config as it is read: sound values, the regularizer, the family and its release."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from repa_lab.bridge.data_set import DataSet, read_data_set
from repa_lab.bridge.flavours import FLAVOURS, REFUSED, find_flavour
from repa_lab.bridge.given import Given, unfit
from repa_lab.bridge.keys import (
    CREPA_MODEL,
    FAMILY_NAMES,
    IREPA,
    KEYS,
    NOT_CARRIED,
    PARTS,
    REST,
    SWITCHES,
    Key,
    Prefix,
    UnfitError,
)
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family
from repa_lab.registry import did_you_mean
from repa_lab.spec.errors import Problem, SpecError

READABLE = {key.name: key for key in (*KEYS["crepa"], *KEYS["urepa"], *IREPA, *REST, *PARTS, *SWITCHES, CREPA_MODEL)}
PREFIXES = ("crepa_", "urepa_", "irepa_")
REGULARIZERS = {"crepa": "repa", "urepa": "urepa"}
_FITS = {"crepa": "transformer", "urepa": "unet"}
_MEGAPIXELS_BELOW = 64  # no image is so small, so the number is an area


@dataclass(frozen=True)
class Reading:
    """A config whose values are sound, one by one.

    Attributes:
        given: the config.
        values: the known keys that it has, as they are called and written here.
        prefix: of the regularizer that is on, or None.
        irepa: whether iREPA is on as well.
        family: the facts of ``model_family``, or None if it names none.
        data_set: the images that ``data_backend_config`` names, or None if its file is not to be had.
    """

    given: Given
    values: Mapping[str, Any]
    prefix: Prefix | None
    irepa: bool
    family: Family | None
    data_set: DataSet | None = None

    def value(self, key: Key) -> Any:
        """What a key says here, SimpleTuner's default if it is left out."""
        return self.values.get(key.name, None if key.default is None else key.read(key.default))

    def part(self, name: str) -> Any:
        """The same by a key's name."""
        return self.value(READABLE[name])

    @property
    def uncheckpointed(self) -> str:
        """Why the family's blocks cannot be checkpointed; empty if they can."""
        network = self.family.network if self.family else None
        return network.uncheckpointed if network else ""

    def is_on(self, name: str) -> bool:
        """Whether a key has an effect there: its regularizer is on, or it is of none."""
        on = {f"{self.prefix}_", "irepa_" if self.irepa else ""}
        return not name.startswith(PREFIXES) or name[:6] in on or name[6:] == "enabled"

    @property
    def source(self) -> str:
        """What the config is called in a sentence."""
        return str(self.given.file or "the flags")

    @property
    def flavour(self) -> str | None:
        """The flavour of the family, as SimpleTuner spells it; where the config names none, the one that stands in."""
        if self.family is None or self.family.name not in FLAVOURS:
            return None
        name = self.part("model_flavour")
        return find_flavour(self.family.name, name) if name else next(iter(FLAVOURS[self.family.name]))

    @property
    def pretrained(self) -> str | None:
        """The pipeline that is trained: the one that the config names, else the flavour's; None if neither is known."""
        named: str | None = self.part("pretrained_model_name_or_path")
        if named or self.family is None:
            return named
        if self.flavour:
            return FLAVOURS[self.family.name][self.flavour]
        return self.family.pipeline.released if self.family.pipeline else None

    @property
    def resolution(self) -> int:
        """Pixels along each side of a square image of the resolution, which may be an area in megapixels."""
        own = self.data_set.values if self.data_set else {}
        given: float = own.get("resolution", self.part("resolution"))
        if own.get("resolution_type", self.part("resolution_type")) == "area" or given < _MEGAPIXELS_BELOW:
            return 64 * round(16 * math.sqrt(max(given, 0)))
        return round(given)

    @property
    def averages(self) -> bool:
        """Whether there is an average of the weights: it is on, or its decay is given and it is not off."""
        return bool(self.values.get("use_ema", "ema_decay" in self.values))


def read(given: Given) -> Reading:
    """Read every known key.

    Raises:
        SpecError: for values that a key cannot have, keys of the regularizers that do not exist, a family that the lab
            does not know, and a regularizer that does not fit it; all of them at once.
    """
    values, problems = _convert(given)
    problems += _unknown(given)
    family = None
    try:
        family = _family(values.get("model_family"))
    except ValueError as error:
        problems.append(given.problem("model_family", str(error)))
    problems += _flavour_problems(given, values, family)
    problems += _switch_problems(given, values, family)
    if problems:
        raise SpecError(problems)
    prefix = next((prefix for prefix in KEYS if values.get(f"{prefix}_enabled")), None)
    return Reading(given, values, prefix, bool(values.get("irepa_enabled")), family, read_data_set(given))


def _convert(given: Given) -> tuple[dict[str, Any], list[Problem]]:
    values, problems = {}, []
    for name in given.values.keys() & READABLE.keys():
        try:
            values[name] = READABLE[name].read(given.values[name])
        except UnfitError as error:
            problems.append(given.problem(name, unfit(given.values[name], error)))
    return values, problems


def _unknown(given: Given) -> Iterator[Problem]:
    known = [name for name in (*READABLE, *NOT_CARRIED) if name.startswith(PREFIXES)]
    for name in given.values:
        if name.startswith(PREFIXES) and name not in known:
            allowed = ", ".join(key for key in known if key.startswith(name[:6]))
            yield given.problem(name, f"SimpleTuner has no such key; allowed: {allowed}{did_you_mean(name, known)}")


def _family(name: str | None) -> Family | None:
    if name is None:
        return None
    ours = name.lower().replace("-", "_")
    try:
        return FAMILIES[ours]
    except ValueError:
        if ours in FAMILY_NAMES:
            return FAMILIES[FAMILY_NAMES[ours]]
        raise


def _flavour_problems(given: Given, values: Mapping[str, Any], family: Family | None) -> Iterator[Problem]:
    name = values.get("model_flavour")
    if name is None or family is None or family.name not in FLAVOURS:
        return
    known, allowed = find_flavour(family.name, name), FLAVOURS[family.name]
    if known is None:
        message = (
            f"unknown flavour '{name}' of {family.name}; allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}"
        )
        yield given.problem("model_flavour", message)
    elif known not in allowed:
        message = f"the lab does not train '{known}': {REFUSED[family.name][known]}; allowed: {', '.join(allowed)}"
        yield given.problem("model_flavour", message)


def _switch_problems(given: Given, values: Mapping[str, Any], family: Family | None) -> Iterator[Problem]:
    on = [prefix for prefix in KEYS if values.get(f"{prefix}_enabled")]
    if len(on) > 1:
        yield given.problem(
            "urepa_enabled", "crepa_enabled is true as well; a run has one regularizer: leave one of them out"
        )
    elif on and family is not None and family.kind != _FITS[on[0]]:
        kind, other = ("a UNet", "urepa_*") if family.kind == "unet" else ("a transformer", "crepa_*")
        fits = "transformers" if on[0] == "crepa" else "UNets"
        message = f"{REGULARIZERS[on[0]]} is for {fits}; {family.name} is {kind}: use {other}"
        yield given.problem(f"{on[0]}_enabled", message)
    if values.get("irepa_enabled") and not on:
        yield given.problem("irepa_enabled", "iREPA needs REPA or U-REPA: set crepa_enabled or urepa_enabled as well")
