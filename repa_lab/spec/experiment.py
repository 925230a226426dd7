"""An experiment: the checked form of one spec file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.spec.document import Draft, load_draft, plain
from repa_lab.spec.errors import Path_, Place, Problem, SpecError, did_you_mean
from repa_lab.spec.expand import Arm, expand
from repa_lab.spec.schema import CompareConfig, Grammar, RunConfig, RunOptions, SearchConfig
from repa_lab.spec.validate import unknown_field, validate


@dataclass(frozen=True)
class Experiment:
    """One question: its arms, its seeds, and what the report compares.

    ``draft`` keeps the places for errors found later.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    compare: CompareConfig
    search: SearchConfig | None
    run: RunOptions
    draft: Draft = field(compare=False, repr=False)

    def problem(self, path: str | Path_, message: str) -> Problem:
        """A problem with a field outside the arms, at the place that set it; keys that hold dots need a path of keys."""
        keys = tuple(path.split(".")) if isinstance(path, str) else path
        return Problem(self.draft.place(keys), ".".join(map(str, keys)), message)


def load_spec(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read and check an experiment.

    Args:
        source: a YAML file, or the same fields as a mapping.
        overrides: dotted paths to values that are laid over the file, as ``--set`` does.

    Raises:
        SpecError: with every problem, each at its file, line and column.
    """
    document = Draft(plain(source)) if isinstance(source, Mapping) else load_draft(Path(source))
    for dotted, value in plain(overrides or {}).items():
        document.set(dotted, value, Place(None))
    return _build(document)


def _build(document: Draft) -> Experiment:
    grammar, problems = _grammar(document)
    problems += _check(grammar, document)
    arms: tuple[Arm, ...] = ()
    try:
        arms = expand(grammar, document)
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(problems)
    seeds = tuple(range(grammar.seeds)) if isinstance(grammar.seeds, int) else tuple(grammar.seeds)
    return Experiment(
        grammar.name, grammar.question, arms, seeds, grammar.compare, grammar.search, grammar.run, document
    )


def _grammar(document: Draft) -> tuple[Grammar, list[Problem]]:
    """The grammar and what is wrong with it; wrong fields are left out, so that the arms are checked all the same."""
    try:
        return validate(Grammar, document), []
    except SpecError as error:
        wrong = {problem.path.split(".")[0] for problem in error.problems}
        sound = {key: value for key, value in document.value.items() if key in Grammar.model_fields and key not in wrong}
        return Grammar.model_validate({"name": "unnamed", **sound}), error.problems


def _check(grammar: Grammar, document: Draft) -> Iterator[Problem]:
    """What pydantic cannot see: a seed given twice, and conditions on what does not exist, which would never hold."""
    if isinstance(grammar.seeds, list) and len(set(grammar.seeds)) < len(grammar.seeds):
        yield Problem(document.place(("seeds",)), "seeds", f"a seed is given twice: {grammar.seeds}")
    axes = document.value.get("axes")
    names = axes if isinstance(axes, dict) else {}
    conditions: dict[Path_, dict[str, Any]] = {("exclude", index): rule for index, rule in enumerate(grammar.exclude)}
    conditions[("compare", "baseline")] = grammar.compare.baseline
    for path, condition in conditions.items():
        for key in condition:
            if key not in names and (message := unknown_field(RunConfig, key)):
                hint = did_you_mean(key, names)
                yield Problem(document.place((*path, key)), ".".join(map(str, (*path, key))), message + hint)
