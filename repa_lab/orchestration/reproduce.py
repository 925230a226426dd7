"""Reproduce a paper's table: at full scale, or its arms at the nano scale, on digits and a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_lab.errors import InputError, Place
from repa_lab.files import examples, write_text
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Shape, shape_of
from repa_lab.registry import did_you_mean
from repa_lab.spec import Arm, Experiment, Problem, RunConfig, SpecError, load_spec
from repa_lab.spec.document import Draft, load_draft, plain
from repa_lab.spec.experiment import config_of
from repa_lab.spec.schema import SECTIONS
from repa_lab.training.resolve import needs_of

if TYPE_CHECKING:
    from repa_lab.report.published import Comparison, PublishedArm

SCALES = ("full", "nano")
PAPERS = examples() / "experiments" / "paper"
NANO_TITLE = "nano scale, on digits: the shape of the effect, not the number"


class ReproduceError(InputError):
    """There is no such table, or none at this scale; the message says which there are."""


def names() -> tuple[str, ...]:
    """Return the names of the tables that can be reproduced, such as ``urepa/table8``."""
    files = sorted(PAPERS.glob("*/*.yaml"))
    return tuple(f"{file.parent.name}/{file.stem}" for file in files if file.parent.name != "presets")


def open_table(name: str, scale: str = "full", overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Return the experiment of a paper's table.

    Args:
        name: one of :func:`names`.
        scale: ``full`` is the spec itself; ``nano`` lays ``nano.yaml`` over every arm.
        overrides: dotted paths to values, laid over everything else.

    Raises:
        ReproduceError: no such table, or its arms cannot be told apart at this scale.
        SpecError: an override is wrong.
    """
    known = names()
    if name not in known:
        raise ReproduceError(f"no table '{name}'; there are: {', '.join(known)}{did_you_mean(name, known)}")
    file, overrides = PAPERS / f"{name}.yaml", overrides or {}
    full = load_spec(file, overrides)
    if scale == "full":
        return full
    if any(needs.encoder_attention for arm in full.arms for needs in needs_of(arm.config)):
        raise ReproduceError(f"{name} aligns attention, and the encoder of the nano scale has none; take --scale full")
    fragment = load_draft(PAPERS / "nano.yaml")  # laid over the spec and over every arm, axes included
    outside_arms = {key: value for key, value in fragment.value.items() if key not in SECTIONS}
    experiment = load_spec(file, {**outside_arms, **overrides})
    arms = tuple(_small_arm(arm, fragment, overrides) for arm in full.arms)
    if len({arm.config for arm in arms}) == 1:
        raise ReproduceError(f"the arms of {name} differ in what the nano scale has only one of; take --scale full")
    question = f"{experiment.question} ({NANO_TITLE})"
    return replace(experiment, name=f"{experiment.name}-nano", question=question, arms=arms)


def _small_arm(arm: Arm, fragment: Draft, overrides: Mapping[str, Any]) -> Arm:
    """Return the arm with the fragment's settings laid over it, and its blocks at the same places of their stages."""
    draft = arm.draft.copy()
    draft.merge(Draft({key: fragment.value[key] for key in SECTIONS if key in fragment.value}, fragment.places))
    small = _shape(config_of(draft))
    for path, settings in arm.config.regularizer_paths:
        for name in ("block_index", "teacher_block"):
            if isinstance(block := getattr(settings, name, None), int):
                place = arm.problem(f"{path}.{name}", "").place
                draft.set(f"{path}.{name}", scaled_block(block, _shape(arm.config), small), place)
    for dotted, value in plain(overrides).items():
        if dotted.split(".")[0] in SECTIONS:
            draft.set(dotted, value, Place(None))
    return replace(arm, config=config_of(draft), draft=draft)


def _shape(config: RunConfig) -> Shape:
    return shape_of(FAMILIES[config.model.family], config.model.size)


def scaled_block(block: int, big: Shape, small: Shape) -> int:
    """Return the block of ``small`` at the same place of its stage as ``block`` of ``big``.

    A block is at its middle: block i of n is at ``(i + 1/2) / n`` of the stage. A shape without stages is one stage.
    """
    above = below = 0
    for large, little in zip(big.stages or (big.depth,), small.stages or (small.depth,), strict=True):
        if block < above + large:
            return below + int((block - above + 0.5) / large * little)
        above, below = above + large, below + little
    return below - 1


def results_of(experiment: Experiment, path: Path, scale: str) -> tuple[tuple[Comparison, ...], list[str]]:
    """Compare a finished sweep with the paper, and write ``reproduce.md`` and ``reproduce.csv`` beside its report.

    Args:
        path: the sweep's folder.

    Returns:
        The comparisons, and what a reader must know of them, with the conclusions, a sentence each.

    Raises:
        SpecError: the spec holds no published number.
    """
    import pandas as pd

    from repa_lab.report import load_results
    from repa_lab.report.published import TEXT, VALUES, compare_published, sentences, table_rows
    from repa_lab.report.tables import Table

    published = experiment.published
    if published is None or not published.arms:
        raise SpecError([Problem(Place(None), "published", "the spec says of no arm what was published")])
    comparisons = compare_published(load_results(path), published, exact=scale == "full")
    lines = [NANO_TITLE] if scale == "nano" else []
    lines += [f"published: {published.source}; {published.protocol}"]
    lines += [f"measured: {metric}" for metric in dict.fromkeys(comparison.metric for comparison in comparisons)]
    if scale == "full":
        lines += [f"tolerance: {published.basis}"] if published.basis else []
        lines += [f"deviation: {text}" for text in published.deviations]
    lines += [sentence for comparison in comparisons for sentence in sentences(comparison)]
    labels = {arm.label for arm in experiment.arms}
    lines += [f"published, and no arm here: {label}" for label in published.arms if label not in labels]
    tables = [Table(table_rows(comparison)).markdown for comparison in comparisons]
    sections = [f"# {experiment.name}", experiment.question, *tables, "\n".join(f"- {line}" for line in lines)]
    write_text(path / TEXT, "\n\n".join(sections) + "\n")
    values = [_values(comparison, row) for comparison in comparisons for row in comparison.rows]
    write_text(path / VALUES, pd.DataFrame(values).to_csv(index=False))
    return comparisons, lines


def _values(comparison: Comparison, row: PublishedArm) -> dict[str, Any]:
    measured, difference = row.measured, row.difference.difference
    return {
        "arm": row.arm,
        "kind": comparison.kind,
        "published": row.published,
        "metric": comparison.metric,
        "n": measured.n,
        "measured": measured.mean,
        "low": measured.low,
        "high": measured.high,
        "reference": comparison.reference,
        "published_difference": row.published_difference,
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "agrees": row.agrees,
        "same_sign": row.same_sign,
    }
