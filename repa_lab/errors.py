"""The base classes of the errors that users see. The command line prints such an error's text, without a traceback."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """An error that a user can mend; its text has a line for each problem.

    Attributes:
        status: exit status of the command line.
    """

    status: ClassVar[int]


class InputError(UserError, ValueError):
    """The input was refused, and nothing was created."""

    status = 2


class StateError(UserError, RuntimeError):
    """The input was right, and the work cannot go on."""

    status = 1
