"""Images, latents and caches. Importing the package costs no torch; some of its modules do."""

from __future__ import annotations

from repa_lab.errors import InputError


class DataError(InputError):
    """Data that cannot be used.

    Attributes:
        field: the setting at fault: one of ``data``, the encoder's ``tae``, or the run's ``encoder_storage``.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)
