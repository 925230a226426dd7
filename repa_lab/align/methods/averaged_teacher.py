"""The base of methods in which the averaged model teaches."""

from __future__ import annotations

from typing import ClassVar

from repa_lab.align.methods.settings import AveragedTeacherSettings
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import Pair, Regularizer, Shapes, Signals
from repa_lab.align.settings import RegularizerSettings


class AveragedTeacher(Regularizer):
    """The base of regularizers that match a block's projected tokens with those of a later block of the averaged model.

    Args:
        settings: an instance of ``Settings``.
        shapes: the widths of the tap and of the averaged model's tap.
    """

    Settings: ClassVar[type[RegularizerSettings]] = AveragedTeacherSettings

    def __init__(self, settings: AveragedTeacherSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (student,), (teacher,) = shapes.taps, shapes.ema_taps
        self.projector = Projector(student, teacher, settings.projector)

    def match(self, signals: Signals) -> Pair:
        """Return projected student tokens and the teacher's tokens without gradient, in float32.

        Where the blocks' grids differ, the teacher is resampled.
        """
        (student,), (teacher,) = signals.taps, signals.ema_taps
        target = teacher.resample(student.grid).values.detach()
        return Pair(self.projector.project(student).values.float(), target.float())
