"""The base classes of the errors that users see. The command line prints such an error's text, without a traceback."""

from __future__ import annotations

import re
from typing import ClassVar

_URL = re.compile(r"\w[\w+.-]*://\S+")
_LOGIN = re.compile(r"(?<=://)([^:/@]*):.*@")
_PARAMETER = re.compile(r"((?:\w*pass\w*|pwd|\w*token|\w*secret)(?:=|%3D))(?:(?!%3B)[^&;'\"])+", re.IGNORECASE)


def hide_passwords(text: str) -> str:
    """Return a text with ``***`` in the place of the passwords in its URLs."""
    return _URL.sub(lambda url: _PARAMETER.sub(r"\1***", _LOGIN.sub(r"\1:***@", url[0])), text)


class UserError(Exception):
    """An error that a user can mend; its text has a line for each problem, and no password.

    Attributes:
        status: exit status of the command line.
    """

    status: ClassVar[int]

    def __str__(self) -> str:
        return hide_passwords(super().__str__())


class InputError(UserError, ValueError):
    """The input was refused, and nothing was created."""

    status = 2


class StateError(UserError, RuntimeError):
    """The input was right, and the work cannot go on."""

    status = 1
