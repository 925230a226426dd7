"""The Optuna study of a search: its database, its name, its sampler and its pruner."""

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
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from repa_lab.errors import InputError
from repa_lab.spec import SearchConfig
from repa_lab.spec.options import Objective

_MAX_LABEL = 200
# SQLite lets one process write at a time; a dashboard that reads must not end a search.
_SQLITE = {"connect_args": {"timeout": 60}}

# Samplers by name, given the seed of the search and the seed of a trial. Samplers that draw from a sequence (QMC) or
# count their draws (CMA-ES) need one seed for the whole study; the others are seeded by trial, so that a search that
# was interrupted draws what it would have drawn without the interruption.
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
# Pruners by name, given the length of a run in steps. The first third of a run says little about its end, so medians
# are not compared there. Successive halving keeps a third of the trials at a ninth of a run, and a third of those at a
# third of it.
_PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "none": lambda steps: optuna.pruners.NopPruner(),
    "median": lambda steps: optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=steps // 3),
    "asha": lambda steps: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 9), reduction_factor=3),
    "hyperband": lambda steps: optuna.pruners.HyperbandPruner(
        min_resource=max(1, steps // 9), max_resource=steps, reduction_factor=3
    ),
}


class StorageError(InputError):
    """The database of a study cannot be used; the text says why and holds no password."""


def open_storage(url: str | None, file: Path) -> RDBStorage:
    """Open the database at a URL, or in a file, which is renamed to ``*.damaged`` and created anew if it is damaged.

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
        raise StorageError(f"cannot use {url}: {_reason(error)}") from None  # shown without the password


def file_url(file: Path) -> str:
    """Return the URL of an SQLite database in a file, whose path may hold any character."""
    return URL.create("sqlite", database=str(file.absolute())).render_as_string(hide_password=False)


def _open_file(file: Path) -> RDBStorage:
    try:
        return RDBStorage(file_url(file), engine_kwargs=_SQLITE)
    except OperationalError as error:  # locked, or not writable: the file itself is fine
        raise StorageError(f"cannot use {file}: {_reason(error)}") from None
    except DatabaseError:
        # The run directories are the truth: a study that cannot be read is rebuilt from them.
        file.rename(file.with_name(f"{file.name}.damaged"))
        return RDBStorage(file_url(file), engine_kwargs=_SQLITE)


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def open_study(
    storage: RDBStorage, name: str, config: SearchConfig, objectives: Sequence[Objective], steps: int
) -> optuna.Study:
    """Open the study of this name, or create it.

    Args:
        storage: the database.
        name: see :func:`study_name`.
        config: the search's section of the spec.
        objectives: metrics by their full names.
        steps: length of a run in optimizer steps.
    """
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        pruner=_PRUNERS[config.prune](steps),
        directions=["minimize" if objective.goal == "min" else "maximize" for objective in objectives],
        load_if_exists=True,
    )
    with _without_experimental_warnings():
        study.set_metric_names([objective.metric for objective in objectives])
    return study


def study_name(sweep: str, label: str, content: Any) -> str:
    """Return a study's name: for people, and with a digest of all that its trials share, so that a changed space opens
    a new study.
    """
    text = json.dumps(content, sort_keys=True)
    return f"{sweep}, {label[:_MAX_LABEL]} [{hashlib.sha256(text.encode()).hexdigest()[:8]}]"


def replace_trials(study: optuna.Study, storage: RDBStorage, trials: Sequence[FrozenTrial]) -> optuna.Study:
    """Create a study anew with these trials, because Optuna does not change trials that have ended."""
    study_id = storage.get_study_id_from_name(study.study_name)
    attributes = storage.get_study_user_attrs(study_id), storage.get_study_system_attrs(study_id)
    optuna.delete_study(study_name=study.study_name, storage=storage)
    replaced = optuna.create_study(
        study_name=study.study_name, storage=storage, pruner=study.pruner, directions=study.directions
    )
    replaced.add_trials(trials)
    study_id = storage.get_study_id_from_name(study.study_name)
    for key, value in attributes[1].items():
        storage.set_study_system_attr(study_id, key, value)
    for key, value in attributes[0].items():
        storage.set_study_user_attr(study_id, key, value)
    return replaced


def seed_sampler(study: optuna.Study, config: SearchConfig, trial: int) -> None:
    """Give a study the sampler of its trial of this number, which does not depend on interruptions before it."""
    with _without_experimental_warnings():
        study.sampler = _SAMPLERS[config.sampler](_mixed(config.seed), _mixed(config.seed, trial))


def _mixed(*numbers: int) -> int:
    """Return a seed made from several, so that neighbouring seeds do not give related draws."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4])


@contextlib.contextmanager
def _without_experimental_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
