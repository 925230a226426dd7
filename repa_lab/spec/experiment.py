"""An experiment: a spec file that was read and validated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.registry import PluginError, did_you_mean, load_plugins
from repa_lab.spec.document import Draft, lay_over, load_draft, names_in, plain
from repa_lab.spec.errors import KeyPath, Place, Problem, SpecError, dotted
from repa_lab.spec.expand import Arm, expand
from repa_lab.spec.options import BudgetConfig, CompareConfig, PublishedConfig, RunOptions, SearchConfig, StopRule
from repa_lab.spec.schema import RunConfig, SpecFile
from repa_lab.spec.validate import unknown_field, validate

_IGNORED = "x-"  # begins the top-level keys that hold what other parts of a file merge with `<<`


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        name: the sweep's name.
        question: the question in words.
        arms: the arms.
        seeds: the seeds with which every arm is trained.
        compare: what the report compares.
        search: the search around every arm, if any.
        run: how runs are carried out.
        budget: what the sweep may cost.
        stop: rules that end a run early.
        published: what a paper reports of the arms, if anything.
        plugins: the Python files that the spec loads.
        draft: the settings with their places, for errors that are found later.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    compare: CompareConfig
    search: SearchConfig | None
    run: RunOptions
    budget: BudgetConfig
    stop: tuple[StopRule, ...]
    published: PublishedConfig | None
    plugins: tuple[str, ...]
    draft: Draft = field(compare=False, repr=False)

    def problem(self, path: str | KeyPath, message: str) -> Problem:
        """Return a problem with a field outside the arms, at the place that set it.

        Args:
            path: the dotted path, or the keys where a key holds dots itself.
            message: what is wrong.
        """
        keys = tuple(path.split(".")) if isinstance(path, str) else path
        return Problem(self.draft.place(keys), dotted(keys), message)


def load_spec(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    fragments: Sequence[str | Path] = (),
) -> Experiment:
    """Read and validate an experiment.

    Args:
        source: a YAML file, or the same fields as a mapping.
        overrides: dotted paths to values, laid over the file and the fragments, as ``--set`` does.
        fragments: YAML files laid over the file one after another, as ``--with`` does.

    Raises:
        SpecError: every problem, each at its file, line and column.
    """
    document = Draft(plain(source)) if isinstance(source, Mapping) else load_draft(Path(source))
    for fragment in fragments:
        lay_over(document, Path(fragment))
    for path, value in plain(overrides or {}).items():
        document.set(path, value, Place(None))
    document.value = {key: value for key, value in document.value.items() if not key.startswith(_IGNORED)}
    _load_plugins(document)
    spec, problems = _validate_outside_arms(document)
    problems += _unknown_conditions(spec, document)
    arms: tuple[Arm, ...] = ()
    try:
        arms = expand(spec, document)
    except SpecError as error:
        problems += error.problems
    problems += _impossible_conditions(spec, document, arms)
    if problems:
        raise SpecError(problems)
    return Experiment(
        name=spec.name,
        question=spec.question,
        arms=arms,
        seeds=tuple(range(spec.seeds)) if isinstance(spec.seeds, int) else tuple(spec.seeds),
        compare=spec.compare,
        search=spec.search,
        run=spec.run,
        budget=spec.budget,
        stop=(spec.stop,) if isinstance(spec.stop, StopRule) else tuple(spec.stop or ()),
        published=spec.published,
        plugins=spec.plugins,
        draft=document,
    )


def _load_plugins(document: Draft) -> None:
    """Load the plugins before anything is validated that they may extend."""
    plugins = document.value.get("plugins")
    if not isinstance(plugins, list):
        return
    for index, file in enumerate(plugins):
        if not isinstance(file, str) or not Path(file).is_file():
            problem = Problem(document.place(("plugins", index)), f"plugins.{index}", f"no Python file {file!r}")
            raise SpecError([problem])
    try:
        load_plugins([Path(file) for file in plugins])
    except PluginError as error:
        raise SpecError([Problem(Place(Path(error.file), error.line), "", error.message)]) from None


def _validate_outside_arms(document: Draft) -> tuple[SpecFile, list[Problem]]:
    """Return the spec file and its problems. Wrong fields are left out, so that the arms can be validated too."""
    try:
        return validate(SpecFile, document), []
    except SpecError as error:
        wrong = {problem.path.split(".")[0] for problem in error.problems}
        valid = {k: v for k, v in document.value.items() if k in SpecFile.model_fields and k not in wrong}
        return SpecFile.model_validate({"name": "unnamed", **valid}), error.problems


def _unknown_conditions(spec: SpecFile, document: Draft) -> Iterator[Problem]:
    """Yield repeated seeds, and search spaces and conditions on fields or levels that do not exist."""
    seeds, names = spec.seeds if isinstance(spec.seeds, list) else [], names_in(document.value)
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            yield Problem(document.place(("seeds", index)), f"seeds.{index}", f"the seed {seed} is given twice")
    for key in spec.search.space if spec.search else ():
        if message := unknown_field(RunConfig, key, names):
            yield Problem(document.place(("search", "space", key)), f"search.space.{key}", message)
    axes = document.value.get("axes")
    axis_names = axes if isinstance(axes, dict) else {}
    for path, wanted in _conditions(spec):
        key, message = str(path[-1]), None
        if isinstance(levels := spec.axes.get(key), dict):
            unknown_levels = [name for name in (wanted if isinstance(wanted, list) else [wanted]) if name not in levels]
            if unknown_levels:
                hint = did_you_mean(str(unknown_levels[0]), levels)
                message = f"no level {unknown_levels[0]!r}; there are: {', '.join(levels)}{hint}"
        elif key not in axis_names and (unknown := unknown_field(RunConfig, key, names)):
            message = unknown + did_you_mean(key, axis_names)
        if message:
            yield Problem(document.place(path), dotted(path), message)


def _impossible_conditions(spec: SpecFile, document: Draft, arms: tuple[Arm, ...]) -> Iterator[Problem]:
    """Yield conditions on values that the field cannot have, such as a misspelt choice: they would never hold."""
    for path, wanted in _conditions(spec) if arms else ():
        key = str(path[-1])
        if key in spec.axes or unknown_field(RunConfig, key, names_in(document.value)):
            continue
        arm = next((arm for arm in arms if arm.has(key)), arms[0])  # an arm with another component ignores the field
        for value in wanted if isinstance(wanted, list) else [wanted]:
            try:
                arm.with_settings({key: value})
            except SpecError as error:
                for problem in error.problems:
                    if problem.path == key:
                        yield Problem(document.place(path), dotted(path), problem.message)


def _conditions(spec: SpecFile) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the entries of the rules of ``exclude`` and of the baseline, each with its path."""
    for index, rule in enumerate(spec.exclude):
        yield from ((("exclude", index, key), value) for key, value in rule.items())
    yield from ((("compare", "baseline", key), value) for key, value in spec.compare.baseline.items())
