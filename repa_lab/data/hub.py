"""A data set of the Hugging Face hub: its commit and its size. Imports no torch and downloads no data."""

from __future__ import annotations

import functools
import re
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.files import digest

_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST = re.compile(r"(.+?)\[:(\d+)\]")  # the first rows of a split, as `datasets` writes it
_SECONDS = 5
_REMEMBERED_S = 60


@dataclass(frozen=True)
class HubData:
    """A split of a data set at a commit.

    Attributes:
        name: the id of the data set, ``owner/name``.
        config: its configuration (subset); None is the default one.
        split: the split, or a slice of one such as ``train[:1000]``.
        commit: 40 hexadecimal digits.
    """

    name: str
    config: str | None
    split: str
    commit: str

    def fingerprint(self, resolution: int, buckets: Buckets | None = None) -> str:
        """Return a digest of what is read and the resolution it is read at; a commit stands for its content."""
        shape = {"resolution": resolution, "buckets": asdict(buckets) if buckets else None}
        return digest({"source": "hub", **asdict(self), **shape})

    def require_hub(self) -> None:
        """Ask the hub for the data set.

        Raises:
            DataError: the hub cannot be reached, or has no such data set or commit.
        """
        _facts(self.name, self.commit)

    def count(self) -> int | None:
        """Return the number of rows as far as the hub's card of the data set says it; None if it cannot be told."""
        split, first = found.groups() if (found := _FIRST.fullmatch(self.split)) else (self.split, None)
        if first is not None:
            return int(first)
        try:
            rows = _facts(self.name, self.commit).rows
        except DataError:
            return None
        configs = {config for config, _ in rows}
        config = self.config or (configs.pop() if len(configs) == 1 else "default")
        return rows.get((config, split))


def resolve_commit(name: str, revision: str | None) -> str:
    """Return the commit of a branch, a tag or a commit; None is the main branch. A commit is not asked for.

    What the hub has answered stays for as long as the process, so that a branch that moves does not part a sweep.

    Raises:
        DataError: the hub cannot be reached, or has no such data set or revision.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    return _facts(name, revision).commit


@dataclass(frozen=True)
class _Facts:
    """What the hub says of a data set: its commit, and the number of rows by configuration and split."""

    commit: str
    rows: Mapping[tuple[str, str], int]


@functools.cache
def _facts(name: str, revision: str | None) -> _Facts:
    answer = _ask(name, revision, int(time.monotonic() // _REMEMBERED_S))
    if isinstance(answer, DataError):
        raise answer
    return answer


@functools.lru_cache(maxsize=64)
def _ask(name: str, revision: str | None, minute: int) -> _Facts | DataError:
    """Ask the hub once; a refusal is remembered for about a minute, for every arm of a sweep asks."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=_SECONDS)
        card: Any = info.card_data
        return _Facts(str(info.sha), _rows(card and card.get("dataset_info")))
    except HFValidationError as error:
        return DataError("name", f"'{name}' is no id of a data set: {_line(error)}")
    except GatedRepoError:
        return DataError("name", f"'{name}' is gated: ask for access on its page, then run `hf auth login`")
    except RepositoryNotFoundError:
        return DataError("name", f"the hub has no data set '{name}'; if it is private, run `hf auth login`")
    except RevisionNotFoundError:
        return DataError("revision", f"'{name}' has no revision '{revision}'")
    except HfHubHTTPError as error:
        return DataError("name", f"the hub refuses '{name}': {_line(error)}")
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses
        advice = "go online, or give as data.revision the commit of a copy in the local cache"
        return DataError("name", f"the hub cannot be reached for '{name}' ({_line(error)}): {advice}")


def _rows(infos: Any) -> dict[tuple[str, str], int]:
    """The numbers of rows in a card: ``dataset_info``, one mapping or a list of them, a configuration each."""
    found = {}
    for info in infos if isinstance(infos, list) else [infos] if isinstance(infos, dict) else []:
        for split in info.get("splits") or []:
            if isinstance(split.get("num_examples"), int):
                found[info.get("config_name", "default"), split["name"]] = split["num_examples"]
    return found


def _line(error: Exception) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
