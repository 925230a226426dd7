"""What can be wrong with data."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used; :attr:`field` names the setting at fault: one of ``data``, or the encoder's ``tae``, or
    the run's ``encoder_storage``."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)
