"""The fields of a spec file, and the validation against them: pydantic's errors become problems with places.

The fields of :class:`RunConfig` are part of a run's identity; no other field is.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from repa_lab.align.settings import EncoderSettings, NoSettings, RegularizerSettings
from repa_lab.data.settings import SourceSettings
from repa_lab.errors import KeyPath, SpecError, dotted, shortened
from repa_lab.registry import did_you_mean
from repa_lab.settings import Count, HubOrLocal, Positive, Settings, SettingsOf, UsedIf, later, settings_in
from repa_lab.spec import options
from repa_lab.spec.document import COMPONENTS, Draft, entries
from repa_lab.spec.evaluate import EvaluateConfig, ExtractorConfig
from repa_lab.spec.train import TrainConfig

M = TypeVar("M", bound=BaseModel)
S = TypeVar("S", bound=Settings)


class ModelConfig(Settings):
    """The denoiser."""

    family: str
    """The family; `repa-lab families` lists them."""
    size: str | None = None
    """Size of a family that is trained from scratch: `B/2`, ..."""
    pretrained: HubOrLocal | None = None
    """For all other families: a hub id or a folder of a diffusers pipeline."""
    train: Literal["full", "lora"] = "full"
    """Train all weights, or a LoRA."""
    rank: Annotated[Positive, UsedIf("train", ("lora",))] = 16
    """Rank of the LoRA."""
    revision: str | None = later(None)
    """The hub's branch, tag or commit."""


class RunConfig(Settings):
    """All settings that decide what a run computes, except its seed."""

    model: ModelConfig
    regularizer: Annotated[RegularizerSettings | tuple[RegularizerSettings, ...], COMPONENTS["regularizer"]] = (
        NoSettings()
    )
    data: Annotated[SourceSettings, COMPONENTS["data"]]
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("regularizer")
    @classmethod
    def _names_differ(
        cls, given: RegularizerSettings | tuple[RegularizerSettings, ...]
    ) -> RegularizerSettings | tuple[RegularizerSettings, ...]:
        if isinstance(given, RegularizerSettings):
            if given.name is not None:
                raise ValueError(f"name '{given.name}' tells a list's regularizers apart: leave it out, or make a list")
            return given
        labels = [member.label for member in given if member.name is not None or member.type != "none"]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two regularizers of the list are called '{twice}': give each a name of its own")
        return given

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as plain data: a plugin may define the settings of a component where pickle cannot find them."""
        return RunConfig.model_validate, (self.model_dump(mode="json"),)

    @property
    def regularizer_paths(self) -> tuple[tuple[str, RegularizerSettings], ...]:
        """Every regularizer with its dotted path; ``none`` is left out."""
        return tuple(pair for pair in self._inside(RegularizerSettings, "regularizer") if pair[1].type != "none")

    @property
    def regularizers(self) -> tuple[RegularizerSettings, ...]:
        """Every regularizer; ``none`` is left out."""
        return tuple(settings for _, settings in self.regularizer_paths)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The steps that are measured by the protocol of milestones."""
        full, steps = self.evaluate.full, self.train.steps
        return () if full is None else tuple(step for step in full.at if step <= steps) or (steps,)

    @property
    def alignment_encoder(self) -> EncoderSettings | None:
        """The encoder that measures alignment; None if alignment is not measured."""
        targets = (encoder for settings in self.regularizers for encoder in settings.encoders)
        return self.evaluate.encoder or next(targets, None)

    @property
    def encoder_paths(self) -> tuple[tuple[str, EncoderSettings], ...]:
        """Every encoder of the run with its dotted path, whether it is a target or measures alignment."""
        return self._inside(EncoderSettings, "regularizer", "evaluate")

    @property
    def extractor_paths(self) -> tuple[tuple[str, ExtractorConfig], ...]:
        """Every extractor that measures samples, with its dotted path."""
        return self._inside(ExtractorConfig, "evaluate")

    def _inside(self, kind: type[S], *sections: str) -> tuple[tuple[str, S], ...]:
        """Return the settings of a kind inside sections, each with its dotted path."""
        settings = (pair for name in sections for pair in settings_in(getattr(self, name), (name,)))
        return tuple((dotted(path), value) for path, value in settings if isinstance(value, kind))


SECTIONS = tuple(RunConfig.model_fields)

Condition = Annotated[dict[str, Any], Field(min_length=1)]
SeedCount = Annotated[int, Field(ge=1, le=1000)]


class Include(Settings):
    """A named extra arm."""

    label: Annotated[str, Field(min_length=1)]
    """The arm's name, one line of text."""
    set: dict[str, Any]
    """The arm's settings by dotted path."""


class SpecFile(Settings):
    """A whole spec file. The sections of :class:`RunConfig` are plain mappings here: they are validated arm by arm.

    ``base`` names a spec file below this one, and ``use`` the fragments between the two; both are merged before the
    document is validated.
    """

    base: str | None = None
    """A spec file under this one, relative to this file."""
    use: str | tuple[str, ...] | None = None
    """A fragment, or a list of them, between the base and this file; relative to this file."""
    model: dict[str, Any] = Field(default_factory=dict)
    """The denoiser."""
    regularizer: dict[str, Any] | list[dict[str, Any]] = Field(default_factory=dict)
    """What is added to the denoising loss: a section, or a list of sections."""
    data: dict[str, Any] = Field(default_factory=dict)
    """The images."""
    train: dict[str, Any] = Field(default_factory=dict)
    """How a run is optimised."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """How a run is measured."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    """The sweep's name and folder: a-z, 0-9, `_`, `.`, `-`, at most 64."""
    question: str = ""
    """Printed over every plan and report."""
    plugins: tuple[str, ...] = ()
    """Python files that register components, relative to this file; see [extending.md](extending.md)."""
    axes: dict[str, options.Values | options.RangeOrLevels] = Field(default_factory=dict)
    """Arms for every combination of these; see [arms](#arms)."""
    one_at_a_time: dict[str, options.Values | options.RangeConfig] = Field(default_factory=dict)
    """An arm for each of these; see [arms](#arms)."""
    exclude: list[Condition] = Field(default_factory=list)
    """Rules that remove arms; see [arms](#arms)."""
    include: list[Include] = Field(default_factory=list)
    """Named extra arms; see [arms](#arms)."""
    seeds: SeedCount | Annotated[list[Count], Field(min_length=1)] = 1
    """Their number, or a list."""
    search: options.SearchConfig | None = None
    """An Optuna search around every arm."""
    compare: options.CompareConfig = options.CompareConfig()
    """What the report compares."""
    budget: options.BudgetConfig = options.BudgetConfig()
    """What the sweep may cost."""
    stop: options.StopRule | Annotated[list[options.StopRule], Field(min_length=1)] | None = None
    """What ends a run early: a rule, or a list of rules of which any one is enough."""
    run: options.RunOptions = options.RunOptions()
    """How runs are carried out."""
    published: options.PublishedConfig | None = None
    """What a paper reports of the arms."""

    @field_validator("base", "use")
    @classmethod
    def _is_merged(cls, value: object) -> None:
        if value is not None:
            raise ValueError("only a spec file can name other files; give a mapping whole")


# ---- validation


def validate(model: type[M], draft: Draft) -> M:
    """Validate a draft against a settings class.

    Raises:
        SpecError: every mistake, each at the place that set the value.
    """
    try:
        return model.model_validate(draft.value)
    except ValidationError as error:
        by_path: dict[KeyPath, list[ErrorDetails]] = {}
        for details in error.errors(include_url=False):
            by_path.setdefault(path_in(draft.value, details), []).append(details)
        problems = []
        for path, errors in by_path.items():
            # An error inside one branch of a union says more than the errors of the branches that do not fit at all.
            if any(path == other[: len(path)] != other for other in by_path):
                continue
            if errors[0]["type"] == "extra_forbidden":
                message = unknown_field_message(path[-1], _owners(model, path[:-1], draft.value))
            else:
                message = expectation(errors)
            problems.append(draft.problem(path, message))
        raise SpecError(problems) from None


def path_in(value: Any, details: ErrorDetails) -> KeyPath:
    """Return where an error of pydantic lies in the data, without the steps that name the branch of a union."""
    loc, path = details["loc"], list[str | int]()
    missing = loc[-1:] if details["type"] == "missing" else ()
    for step in loc[: len(loc) - len(missing)]:
        if step in entries(value):
            value = entries(value)[step]
            path.append(step)
    return (*path, *missing)


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("string_type", "string_unicode"), "text"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a mapping"),
    "form": "a mapping or a list",
    "string_pattern_mismatch": "text that matches {pattern}",
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number of more than {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number of less than {lt}",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "{min_length} or more values",
    "too_long": "at most {max_length} values",
}


def expectation(errors: Sequence[ErrorDetails]) -> str:
    """Return what pydantic expected of one value, what was given, and the choice that was probably meant."""
    first, choices, expected = errors[0], list[str](), list[str]()
    if first["type"] == "missing":
        return "this field is required"
    for details in errors:
        kind, context, message = details["type"], details.get("ctx", {}), details["msg"]
        if kind == "value_error":
            return str(context["error"])
        if kind == "literal_error":
            allowed = context["expected"].replace(" or ", ", ").split(", ")
            literals = [{"False": "false", "True": "true"}.get(word, word.strip("'")) for word in allowed]
            choices += literals
            expected.append(f"one of {', '.join(literals)}" if len(literals) > 1 else literals[0])
        else:
            words = _EXPECTED[kind].format(**context) if kind in _EXPECTED else message[0].lower() + message[1:]
            expected.append(words)
    hint = did_you_mean(first["input"], choices) if isinstance(first["input"], str) else ""
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {shortened(first['input'])}{hint}"


def unknown_field(model: type[BaseModel], path: str, names: Collection[str] = ()) -> str | None:
    """Return an error message if a dotted path leads to no field of a model, else None.

    In a section that holds the settings of a component, the fields of every component count.
    """
    keys: KeyPath = ()
    for step in path.split("."):
        owners = _owners(model, keys)
        if (step.isdecimal() or step in names) and _owners(model, (*keys, 0)):
            keys = (*keys, 0)
            continue
        if not owners:
            return f"'{dotted(keys)}' is a value, so it has no field '{step}'"
        if not any(step in fields_of(owner) for owner in owners):
            return unknown_field_message(step, owners)
        keys = (*keys, step)
    return None


def unknown_field_message(name: str | int, owners: Sequence[type[BaseModel]]) -> str:
    """Return the error message for a field that none of the models has."""
    allowed = sorted({field for owner in owners for field in fields_of(owner)})
    listed = f"; allowed: {', '.join(allowed)}" if allowed else ""
    return f"unknown field '{name}'{listed}{did_you_mean(str(name), allowed)}"


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the type of every field that a file may set, by name; of a section with components, their registry."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items() if not field.exclude}
    return fields | COMPONENTS if model is RunConfig else fields


def _owners(model: type[BaseModel], path: KeyPath, value: Any = None) -> tuple[type[BaseModel], ...]:
    """Return the models that may be at a path, through optional, list and mapping fields.

    Args:
        path: field names, keys and positions.
        value: the data, which names the component of a section; without it, every component counts.
    """
    annotations: tuple[Any, ...] = (model,)
    for step in path:
        annotations = tuple(below for annotation in annotations for below in _below(annotation, step, value))
        value = entries(value).get(step)
    return tuple(dict.fromkeys(owner for annotation in annotations for owner in models_of(annotation, value)))


def _below(annotation: Any, step: str | int, value: Any) -> Iterator[Any]:
    """Yield the types of the value at ``step`` inside a value of a type."""
    if isinstance(step, str) and (models := models_of(annotation, value)):
        yield from (fields_of(model)[step] for model in models if step in fields_of(model))
        return
    if isinstance(annotation, SettingsOf) and annotation.several:
        yield annotation
    for member in members(annotation):
        if typing.get_origin(member) in (list, dict, tuple):
            arguments = typing.get_args(member)
            yield arguments[0] if arguments[-1] is Ellipsis else arguments[-1]


def models_of(annotation: Any, value: Any = None) -> tuple[type[BaseModel], ...]:
    """Return the models among the members of a type: of components the one that the value names, else all."""
    if not isinstance(annotation, SettingsOf):
        return tuple(filter(is_model, members(annotation)))
    named = annotation.settings_of(value) if isinstance(value, dict) else None
    return (named,) if named else annotation.choices


def is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether a type is a model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself, without metadata."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for choice in typing.get_args(annotation) for member in members(choice))
    return members(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is Annotated else (annotation,)
