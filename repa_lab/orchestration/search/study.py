"""Optuna's side of a search: where a study is kept, under which name, with which sampler and which pruner."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from repa_lab.orchestration.search.group import Aim
from repa_lab.spec import SearchConfig

_MAX_LABEL = 200
# SQLite lets one process write at a time; a dashboard that reads must not end a search.
_SQLITE = {"connect_args": {"timeout": 60}}

# Given the seed of the search and one of the trial. What draws from a sequence (QMC) or numbers its draws itself
# (CMA-ES) needs one seed for the whole study; the rest is seeded by trial, so that a search goes on after a kill as it
# would have without.
_SAMPLERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed, of_trial: optuna.samplers.TPESampler(seed=of_trial),
    "random": lambda seed, of_trial: optuna.samplers.RandomSampler(seed=of_trial),
    "qmc": lambda seed, of_trial: optuna.samplers.QMCSampler(
        scramble=True,
        seed=seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=of_trial),
        warn_independent_sampling=False,
    ),
    "cmaes": lambda seed, of_trial: optuna.samplers.CmaEsSampler(
        seed=seed, independent_sampler=optuna.samplers.RandomSampler(seed=of_trial), warn_independent_sampling=False
    ),
}
# Given the length of a run in steps. The first third of a run says little of its end: no pruning on medians there.
# Successive halving lets a third of the trials beyond a ninth of a run, and a third of those beyond a third of it.
_PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "none": lambda steps: optuna.pruners.NopPruner(),
    "median": lambda steps: optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=steps // 3),
    "asha": lambda steps: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 9), reduction_factor=3),
    "hyperband": lambda steps: optuna.pruners.HyperbandPruner(
        min_resource=max(1, steps // 9), max_resource=steps, reduction_factor=3
    ),
}


class StorageError(ValueError):
    """The database of a study cannot be used; the text says why and holds no password."""


def open_storage(url: str | None, file: Path) -> RDBStorage:
    """The database that a spec names, or else a file, which is put aside and begun anew if it is damaged.

    Raises:
        StorageError: the database cannot be used.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    if url is None:
        return _open_file(file)
    try:
        is_sqlite = make_url(url).get_backend_name() == "sqlite"
        return RDBStorage(url, engine_kwargs=_SQLITE if is_sqlite else None)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError, OSError) as error:
        raise StorageError(f"cannot use {hide_password(url)}: {_reason(error, url)}") from None


def hide_password(url: str) -> str:
    """A database's URL as it may be shown."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "the database"


def open_study(storage: RDBStorage, name: str, config: SearchConfig, aims: Sequence[Aim], steps: int) -> optuna.Study:
    """The study of this name, made if need be, with the pruner for runs of so many steps."""
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        pruner=_PRUNERS[config.prune](steps),
        directions=["minimize" if aim.goal == "min" else "maximize" for aim in aims],
        load_if_exists=True,
    )
    with _quiet():
        study.set_metric_names([aim.name for aim in aims])
    return study


def study_name(sweep: str, label: str, content: Any) -> str:
    """A study's name: for people, and with a digest of all that its trials have in common, so that a changed space
    opens a new one."""
    text = json.dumps(content, sort_keys=True)
    return f"{sweep}, {label[:_MAX_LABEL]} [{hashlib.sha256(text.encode()).hexdigest()[:8]}]"


def seed_sampler(study: optuna.Study, config: SearchConfig) -> None:
    """Give a study the sampler of its next trial: the same whether or not the search was interrupted before it."""
    number = len(study.get_trials(deepcopy=False))
    with _quiet():
        study.sampler = _SAMPLERS[config.sampler](_mixed(config.seed), _mixed(config.seed, number))


def _mixed(*numbers: int) -> int:
    """A seed from several: neighbouring ones must not give neighbouring draws, nor one search the draws of another."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4])


def _open_file(file: Path) -> RDBStorage:
    url = f"sqlite:///{file.absolute()}"
    try:
        return RDBStorage(url, engine_kwargs=_SQLITE)
    except OperationalError as error:  # locked, or not ours to write: nothing is wrong with the file
        raise StorageError(f"cannot use {file}: {_reason(error, url)}") from None
    except DatabaseError:
        # The run directories are the truth: a study that cannot be read is one that is lost.
        file.rename(file.with_name(f"{file.name}.damaged"))
        return RDBStorage(url, engine_kwargs=_SQLITE)


def _reason(error: Exception, url: str) -> str:
    """The first line of an error without the URL, which may hold a password."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(url, hide_password(url))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a part of Optuna may change in its next version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
