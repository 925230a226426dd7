"""Components by name, open to plugins: built-in ones and users' own register by the same call. Imports no torch."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
ENTRY_POINTS = "repa_lab"
_PACKAGE = __name__.partition(".")[0]


class UnknownComponentError(ValueError):
    """A name that no component of its kind has; the message lists the names that are taken."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {kind} '{name}'; allowed: {', '.join(known)}{hint}")


class PluginError(ValueError):
    """What is wrong with a plugin, in one line that begins with its file and line."""

    def __init__(self, file: str | Path, line: int, message: str) -> None:
        self.file, self.line, self.message = str(file), line, message
        super().__init__(f"{file}:{line}: {message}")


@dataclass(frozen=True)
class Origin:
    """Where a plugin's component was registered.

    Attributes:
        file: the plugin's file.
        line: of the registration, counted from 1.
        digest: SHA-256 of the file, part of the identity of every run that uses the component.
    """

    file: str
    line: int
    digest: str


class Registry(Mapping[str, T]):
    """The components of one kind by name.

    Args:
        kind: what a component is called in errors.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._components: dict[str, T] = {}
        self._origins: dict[str, Origin] = {}
        _REGISTRIES.append(self)

    def add(self, name: str, component: T) -> None:
        """Register a component.

        Raises:
            PluginError: a plugin takes a name that another component has.
        """
        origin = _calling_origin()
        taken = self._origins.get(name)
        if name in self._components and not (
            taken and not Path(taken.file).is_file()
        ):  # a notebook's cell may run again
            owner = f"{taken.file}:{taken.line}" if taken else "repa-lab"
            message = f"the {self.kind} '{name}' exists already ({owner}); choose another name"
            raise PluginError(origin.file, origin.line, message) if origin else ValueError(message)
        self._components[name] = component
        if origin:
            self._origins[name] = origin

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise UnknownComponentError(self.kind, name, self.names)
        return self._components[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the component of a name, or the default if there is none."""
        return self._components[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        if name not in self._components:
            load_entry_points()
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        load_entry_points()
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, built-in ones first."""
        return tuple(self)

    def origin(self, name: str) -> Origin | None:
        """Where a plugin registered a component; None for a built-in one."""
        return self._origins.get(name)

    def drop(self, file: str) -> None:
        """Forget what a plugin's file has registered."""
        for name in [name for name, origin in self._origins.items() if origin.file == file]:
            del self._components[name], self._origins[name]


_REGISTRIES: list[Registry[Any]] = []
_LOADED: dict[str, tuple[str, ModuleType]] = {}  # the digest and the module of every plugin file


def load_plugins(files: Sequence[Path]) -> None:
    """Import plugin files, each once; a file that has changed since is imported anew.

    Raises:
        PluginError: a file is missing, raises, or registers what does not do.
    """
    for file in files:
        _load(str(file.resolve()))


@functools.cache
def load_entry_points() -> None:
    """Import the plugins of installed packages, once; they declare them in the entry point group ``repa_lab``.

    Raises:
        PluginError: a plugin raises, or registers what does not do.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.module not in sys.modules:
            try:
                entry.load()
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(*_place_in_package(error, entry.module), _said(error)) from error


def blamed(error: BaseException) -> tuple[str, int] | None:
    """Return the file and the line of the innermost frame of an error that lies in a plugin; None if none does."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    plugins = [(file, line) for file, line in frames if _is_plugin(file)]
    if isinstance(error, SyntaxError) and error.filename and _is_plugin(error.filename):
        return error.filename, error.lineno or 1
    return plugins[-1] if plugins else None


def _place_in_package(error: Exception, module: str) -> tuple[str, int]:
    """Return the file and the line of the innermost frame of an error that lies in the package of a module."""
    if isinstance(error, SyntaxError) and error.filename:
        return error.filename, error.lineno or 1
    package = module.partition(".")[0]
    frames = traceback.walk_tb(error.__traceback__)
    own = [
        (f.f_code.co_filename, line)
        for f, line in frames
        if f.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    return own[-1] if own else (module, 1)


def loaded_plugins() -> dict[str, str]:
    """Return the SHA-256 of every plugin file that this process has loaded, by the file."""
    return {file: digest for file, (digest, _) in _LOADED.items()}


def drop_plugins(files: Sequence[Path]) -> None:
    """Forget plugin files and what they have registered."""
    for file in (str(file.resolve()) for file in files):
        for registry in _REGISTRIES:
            registry.drop(file)
        if file in _LOADED:
            sys.modules.pop(_LOADED.pop(file)[1].__name__, None)


def load_planned(digests: Mapping[str, str]) -> None:
    """Load the plugins of another process, as a worker does.

    Args:
        digests: what that process had loaded; see :func:`loaded_plugins`.

    Raises:
        PluginError: a file has changed since, or cannot be loaded.
    """
    load_plugins([Path(file) for file in digests])
    for file, digest in digests.items():
        if _LOADED[file][0] != digest:
            raise PluginError(file, 1, "the file has changed since the sweep was planned; start the sweep again")


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message, behind the plugin's file and line if a plugin raised it."""
    if isinstance(error, PluginError):
        return str(error)
    place = blamed(error)
    return f"{place[0]}:{place[1]}: {_said(error)}" if place else _said(error)


def _load(file: str) -> None:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise PluginError(file, 1, f"cannot read the plugin: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if file in _LOADED and _LOADED[file][0] == digest:
        return
    for registry in _REGISTRIES:
        registry.drop(file)
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
        del _LOADED[file], sys.modules[name]
        for registry in _REGISTRIES:
            registry.drop(file)
        if isinstance(error, PluginError) or not isinstance(error, Exception):
            raise
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(error, file)
        raise PluginError(file, line or 1, _said(error)) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _line_in(error: Exception, file: str) -> int | None:
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return lines[-1] if lines else None


def _is_plugin(file: str) -> bool:
    return file in _LOADED or any(
        origin.file == file for registry in _REGISTRIES for origin in registry._origins.values()
    )


def _calling_origin() -> Origin | None:
    """The first caller outside this package, whose file is the plugin; None while the package registers its own."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not (module == _PACKAGE or module.startswith(f"{_PACKAGE}.")):
            file = frame.f_code.co_filename
            if file.startswith("<frozen importlib"):  # a module of this package is being imported
                return None
            content = Path(file).read_bytes() if Path(file).is_file() else "".join(linecache.getlines(file)).encode()
            return Origin(file, frame.f_lineno, hashlib.sha256(content).hexdigest())
        frame = frame.f_back
    return None
