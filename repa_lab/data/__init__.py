"""Images, latents and caches. Importing the package costs no torch; some of its modules do."""

from __future__ import annotations

from repa_lab.errors import InputError


class DataError(InputError):
    """Data that cannot be used.

    Attributes:
        field: the setting at fault: one of ``data``, the encoder's ``tae``, or the run's ``encoder_storage`` or
            ``data_workers``.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        """Let the error go from a data loader's process to the one that trains."""
        return DataError, (self.field, str(self))
