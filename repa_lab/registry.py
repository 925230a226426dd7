"""Registries of components, and the plugins that add to them. Imports no torch."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from repa_lab.errors import InputError

T = TypeVar("T")
ENTRY_POINTS = "repa_lab"
_PACKAGE = __name__.partition(".")[0]


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` if an allowed word is close to the given one, else an empty string."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


class UnknownComponentError(InputError):
    """No component of a registry has the given name; the message lists the registered names."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        super().__init__(f"unknown {kind} '{name}'; allowed: {', '.join(known)}{did_you_mean(name, known)}")


class PluginError(InputError):
    """A mistake in a plugin; the message is one line that begins with the plugin's file and line."""

    def __init__(self, file: str | Path, line: int, message: str) -> None:
        self.file, self.line, self.message = str(file), line, message
        super().__init__(f"{file}:{line}: {message}")


@dataclass(frozen=True)
class Origin:
    """The file and line, from 1, of the call that registered a plugin's component.

    ``digest`` is the SHA-256 of the file, which is part of the identity of every run that uses the component.
    """

    file: str
    line: int
    digest: str


class Registry(Mapping[str, T]):
    """The components of one kind by name; ``kind`` is the word for a component in error messages."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[T, Origin | None]] = {}  # of every name the component, and the plugin's call
        _REGISTRIES.append(self)

    def add(self, name: str, component: T) -> None:
        """Register a component.

        Raises:
            PluginError: a plugin registers a name that is taken.
        """
        origin = _calling_origin()
        taken = self._entries[name][1] if name in self._entries else None
        runs_again = taken is not None and not Path(taken.file).is_file()  # a cell of a notebook
        if name in self._entries and not runs_again:
            owner = f"{taken.file}:{taken.line}" if taken else "repa-lab"
            message = f"the {self.kind} '{name}' exists already ({owner}); choose another name"
            raise PluginError(origin.file, origin.line, message) if origin else ValueError(message)
        self._entries[name] = component, origin

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise UnknownComponentError(self.kind, name, self.names)
        return self._entries[name][0]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the component with a name, or the default if there is none."""
        return self._entries[name][0] if name in self else default

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            load_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        load_entry_points()
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self)

    @property
    def plugin_files(self) -> set[str]:
        """The plugin files that registered components."""
        return {origin.file for _, origin in self._entries.values() if origin}

    def origin(self, name: str) -> Origin | None:
        """Return where a plugin registered a component; None for a built-in component."""
        return self._entries[name][1] if name in self._entries else None

    def drop(self, file: str) -> None:
        """Remove the components that a plugin file registered."""
        for name, (_, origin) in list(self._entries.items()):
            if origin and origin.file == file:
                del self._entries[name]


_REGISTRIES: list[Registry[Any]] = []
_LOADED: dict[str, tuple[str, ModuleType]] = {}  # plugin file to its digest and module


def load_plugins(files: Sequence[Path]) -> None:
    """Import plugin files, each once; a file that has changed is imported again.

    Raises:
        PluginError: a file is missing, raises an error, or registers something unusable.
    """
    for file in (str(file.resolve()) for file in files):
        try:
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise PluginError(file, 1, f"cannot read the plugin: {error.strerror}") from None
        if file in _LOADED and _LOADED[file][0] == digest:
            continue
        drop_plugins([Path(file)])
        name = f"repa_lab_plugin_{hashlib.sha256(file.encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise PluginError(file, 1, "a plugin is a Python file, NAME.py")
        module = importlib.util.module_from_spec(spec)
        _LOADED[file] = (digest, module)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            place = blamed(error) or (file, 1)
            drop_plugins([Path(file)])
            if isinstance(error, PluginError) or not isinstance(error, Exception):
                raise
            raise PluginError(*place, _first_line(error)) from error


def load_planned(digests: Mapping[str, str]) -> None:
    """Load in a worker the plugin files that the planning process had loaded.

    Args:
        digests: SHA-256 of each file, from :func:`loaded_plugins` of the planning process.

    Raises:
        PluginError: a file has changed since, or cannot be loaded.
    """
    load_plugins([Path(file) for file in digests])
    for file, digest in digests.items():
        if _LOADED[file][0] != digest:
            raise PluginError(file, 1, "the file has changed since the sweep was planned; start the sweep again")


@functools.cache
def load_entry_points() -> None:
    """Import, once, the plugins that installed packages declare in the entry point group ``repa_lab``.

    Raises:
        PluginError: a plugin raises an error, or registers something unusable.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.module not in sys.modules:
            try:
                entry.load()
            except PluginError:
                raise
            except Exception as error:
                place = blamed(error, entry.module.partition(".")[0]) or (entry.module, 1)
                raise PluginError(*place, _first_line(error)) from error


def loaded_plugins() -> dict[str, str]:
    """Return the SHA-256 of every plugin file that this process has loaded, by file."""
    return {file: digest for file, (digest, _) in _LOADED.items()}


def drop_plugins(files: Sequence[Path]) -> None:
    """Unload plugin files and remove the components that they registered."""
    for file in (str(file.resolve()) for file in files):
        for registry in _REGISTRIES:
            registry.drop(file)
        if file in _LOADED:
            sys.modules.pop(_LOADED.pop(file)[1].__name__, None)


def one_line(error: BaseException) -> str:
    """Return an error's type and first line; if a plugin raised it, the plugin's file and line come first."""
    if isinstance(error, PluginError):
        return str(error)
    place = blamed(error)
    return f"{place[0]}:{place[1]}: {_first_line(error)}" if place else _first_line(error)


def blamed(error: BaseException, package: str = "") -> tuple[str, int] | None:
    """Return the file and line of the innermost frame of an error that lies in a plugin file, or in a package."""
    plugins = {*_LOADED}.union(*(registry.plugin_files for registry in _REGISTRIES))
    if isinstance(error, SyntaxError) and error.filename and (package or error.filename in plugins):
        return error.filename, error.lineno or 1
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if module.partition(".")[0] == package if package else file in plugins:
            return file, line
    return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _calling_origin() -> Origin | None:
    """Return the first caller outside this package, a plugin; None for a component of this package."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
            file = frame.f_code.co_filename
            if file.startswith("<frozen importlib"):  # a module of this package is being imported
                return None
            content = Path(file).read_bytes() if Path(file).is_file() else "".join(linecache.getlines(file)).encode()
            return Origin(file, frame.f_lineno, hashlib.sha256(content).hexdigest())
        frame = frame.f_back
    return None
