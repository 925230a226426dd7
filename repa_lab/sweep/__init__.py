"""A sweep: its plan, its scheduler, where runs are executed, and search. Importing the room costs no torch.

The room and the public function share their name: `from repa_lab import sweep` finds this package once any of it has been
imported, so the package can be called and then is :func:`repa_lab.sweep.api.sweep`.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_lab.sweep.api import SweepOutcome


class _Room(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> SweepOutcome:
        """See :func:`repa_lab.sweep.api.sweep`."""
        from repa_lab.sweep.api import sweep

        return sweep(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
