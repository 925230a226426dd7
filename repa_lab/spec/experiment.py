"""An experiment: the checked form of one spec file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.registry import PluginError, load_plugins
from repa_lab.spec.document import Draft, lay_over, load_draft, plain
from repa_lab.spec.errors import Path_, Place, Problem, SpecError, did_you_mean
from repa_lab.spec.expand import Arm, expand
from repa_lab.spec.grammar import Grammar
from repa_lab.spec.limits import BudgetConfig, StopRule
from repa_lab.spec.options import RunOptions
from repa_lab.spec.published import PublishedConfig
from repa_lab.spec.schema import CompareConfig, RunConfig
from repa_lab.spec.search import SearchConfig
from repa_lab.spec.validate import unknown_field, validate


@dataclass(frozen=True)
class Experiment:
    """One question: its arms, its seeds, and what the report compares.

    ``draft`` keeps the places for errors found later. ``budget`` is what the sweep may cost, ``stop`` what ends a run
    early, ``published`` what a paper reports of the arms, ``plugins`` the Python files that it loads.
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

    def problem(self, path: str | Path_, message: str) -> Problem:
        """A problem with a field outside the arms, at the place that set it; keys that hold dots need a path of keys."""
        keys = tuple(path.split(".")) if isinstance(path, str) else path
        return Problem(self.draft.place(keys), ".".join(map(str, keys)), message)


def load_spec(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    fragments: Sequence[str | Path] = (),
) -> Experiment:
    """Read and check an experiment.

    Args:
        source: a YAML file, or the same fields as a mapping.
        overrides: dotted paths to values that are laid over the file and the fragments, as ``--set`` does.
        fragments: YAML files that are laid over the file one after another, as ``--with`` does; see :func:`lay_over`.

    Raises:
        SpecError: with every problem, each at its file, line and column.
    """
    document = Draft(plain(source)) if isinstance(source, Mapping) else load_draft(Path(source))
    for fragment in fragments:
        lay_over(document, Path(fragment))
    for dotted, value in plain(overrides or {}).items():
        document.set(dotted, value, Place(None))
    return _build(document)


def _build(document: Draft) -> Experiment:
    _load_plugins(document)
    grammar, problems = _grammar(document)
    problems += _check(grammar, document)
    arms: tuple[Arm, ...] = ()
    try:
        arms = expand(grammar, document)
    except SpecError as error:
        problems += error.problems
    problems += _impossible(grammar, document, arms)
    if problems:
        raise SpecError(problems)
    seeds = tuple(range(grammar.seeds)) if isinstance(grammar.seeds, int) else tuple(grammar.seeds)
    rules = [grammar.stop] if isinstance(grammar.stop, StopRule) else grammar.stop or []
    asked = (
        grammar.compare,
        grammar.search,
        grammar.run,
        grammar.budget,
        tuple(rules),
        grammar.published,
        grammar.plugins,
    )
    return Experiment(grammar.name, grammar.question, arms, seeds, *asked, document)


def _load_plugins(document: Draft) -> None:
    """Load the plugins that a document names, before anything is checked that they may extend."""
    named = document.value.get("plugins", [])
    for index, file in enumerate(named if isinstance(named, list) else []):
        if not isinstance(file, str) or not Path(file).is_file():
            problem = Problem(document.place(("plugins", index)), f"plugins.{index}", f"no Python file {file!r}")
            raise SpecError([problem])
    try:
        load_plugins([Path(file) for file in named if isinstance(file, str)] if isinstance(named, list) else [])
    except PluginError as error:
        raise SpecError([Problem(Place(Path(error.file), error.line), "", error.message)]) from None


def _grammar(document: Draft) -> tuple[Grammar, list[Problem]]:
    """The grammar and what is wrong with it; wrong fields are left out, so that the arms are checked all the same."""
    try:
        return validate(Grammar, document), []
    except SpecError as error:
        wrong = {problem.path.split(".")[0] for problem in error.problems}
        sound = {
            key: value for key, value in document.value.items() if key in Grammar.model_fields and key not in wrong
        }
        return Grammar.model_validate({"name": "unnamed", **sound}), error.problems


def _check(grammar: Grammar, document: Draft) -> Iterator[Problem]:
    """What pydantic cannot see: a seed given twice, and conditions on what does not exist, which would never hold."""
    yield from _repeated_seeds(grammar, document)
    for key in grammar.search.space if grammar.search else ():
        if message := unknown_field(RunConfig, key):
            yield Problem(document.place(("search", "space", key)), f"search.space.{key}", message)
    axes = document.value.get("axes")
    names = axes if isinstance(axes, dict) else {}
    for path, value in _conditions(grammar):
        key = str(path[-1])
        message = _unknown_level(value, grammar.axes[key]) if key in grammar.axes else None
        if key not in names and (unknown := unknown_field(RunConfig, key)):
            message = unknown + did_you_mean(key, names)
        if message:
            yield Problem(document.place(path), ".".join(map(str, path)), message)


def _impossible(grammar: Grammar, document: Draft, arms: tuple[Arm, ...]) -> Iterator[Problem]:
    """Conditions on values that their field cannot have, such as a misspelt choice: they would never hold."""
    for path, wanted in _conditions(grammar) if arms else ():
        key = str(path[-1])
        if key in grammar.axes or unknown_field(RunConfig, key):
            continue
        arm = next((arm for arm in arms if arm.has(key)), arms[0])  # another's component may ignore the field
        for value in wanted if isinstance(wanted, list) else [wanted]:
            try:
                arm.with_settings({key: value})
            except SpecError as error:
                told = [problem.message for problem in error.problems if problem.path == key]
                yield from (Problem(document.place(path), ".".join(map(str, path)), message) for message in told)


def _conditions(grammar: Grammar) -> Iterator[tuple[Path_, Any]]:
    """What rules and the baseline ask of an arm, each with its path."""
    for index, rule in enumerate(grammar.exclude):
        yield from ((("exclude", index, key), value) for key, value in rule.items())
    yield from ((("compare", "baseline", key), value) for key, value in grammar.compare.baseline.items())


def _unknown_level(wanted: Any, levels: Any) -> str | None:
    names = list(levels) if isinstance(levels, dict) else None
    unknown = [name for name in (wanted if isinstance(wanted, list) else [wanted]) if names and name not in names]
    if not unknown:
        return None
    return f"no level {unknown[0]!r}; there are: {', '.join(levels)}{did_you_mean(str(unknown[0]), levels)}"


def _repeated_seeds(grammar: Grammar, document: Draft) -> Iterator[Problem]:
    seeds = grammar.seeds if isinstance(grammar.seeds, list) else []
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            yield Problem(document.place(("seeds", index)), f"seeds.{index}", f"the seed {seed} is given twice")
