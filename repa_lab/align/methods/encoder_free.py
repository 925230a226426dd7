"""Methods without an encoder: the model teaches itself, its latents teach it, or images repel each other.

The teacher is a later block of the denoiser itself (LayerSync), of its averaged model (SRA, Self-Flow), or of a frozen
earlier model of its kind (Self-Transcendence). Where the blocks' grids differ, the teacher is resampled; no gradient
reaches it. In SRA2 the clean latents teach. Dispersive has no teacher.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from repa_lab.align.losses import alignment_loss, token_cosine
from repa_lab.align.methods.settings import (
    AveragedTeacherSettings,
    DispersiveSettings,
    LayerSyncSettings,
    SelfFlowSettings,
    SelfTranscendenceSettings,
    SRA2Settings,
    SRASettings,
)
from repa_lab.align.projector import Projector
from repa_lab.align.ranks import gather
from repa_lab.align.regularizer import Loss, Pair, Regularizer, Shapes, Signals
from repa_lab.align.settings import RegularizerSettings
from repa_lab.align.tokens import Grid, Tokens, flatten_map


class LayerSync(Regularizer):
    """LayerSync (2510.12581): ``-mean_bn cos(h_bn, sg(g_bn))``.

    ``h`` are the tokens that leave an early block and ``g`` those that leave a later block in the same forward pass; no
    gradient reaches the later block through them (sg).
    """

    Settings: ClassVar[type[RegularizerSettings]] = LayerSyncSettings
    settings: LayerSyncSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the mean cosine, which is a part.

        Args:
            signals: the student's and the teacher's tokens, ``(B, N, D)`` and ``(B, M, D)``.
            step: optimizer steps already taken.
        """
        student, teacher = signals.taps
        value = alignment_loss(student.values, teacher.resample(student.grid).values)
        return Loss(value, {"cosine": -value.detach()})


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

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the loss of :meth:`compare`; the mean cosine is a part.

        Args:
            signals: one tap ``(B, N, D)`` and one tap of the averaged model ``(B, M, D)``.
            step: optimizer steps already taken.
        """
        (student,), (teacher,) = signals.taps, signals.ema_taps
        target = teacher.resample(student.grid).values.detach()
        pair = Pair(self.projector.project(student).values.float(), target.float())
        cosine = token_cosine(*pair).mean()
        return Loss(self.compare(pair, cosine), {"cosine": cosine.detach()})

    def compare(self, pair: Pair, cosine: torch.Tensor) -> torch.Tensor:
        """Return the loss of matched tokens in float32, given their mean cosine: minus the cosine."""
        return -cosine


class SRA(AveragedTeacher):
    """SRA (2505.02831): ``mean_bnk smooth_l1(P(h)_bnk - g_bnk)`` with ``beta`` 0.05.

    ``h`` are the tokens that leave a block of the model that trains, at time t. ``g`` are the tokens that leave a later
    block of the averaged model at time ``max(0, t - u)`` with the same noise and conditioning, u uniform between 0 and
    ``less_noise`` for each image. ``smooth_l1(d)`` is ``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``.

    ``loss: cosine`` is ``-mean_bn cos(P(h)_bn, g_bn)`` over the channels of every token. The released code takes its
    cosine over the second of three dimensions, which are the tokens; the paper compares tokens.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SRASettings
    settings: SRASettings

    def compare(self, pair: Pair, cosine: torch.Tensor) -> torch.Tensor:
        """Return the smooth L1 loss or minus the mean cosine."""
        if self.settings.loss == "cosine":
            return -cosine
        return functional.smooth_l1_loss(*pair, beta=self.settings.beta)


class SelfFlow(AveragedTeacher):
    """Self-Flow (2603.06507): ``-mean_bn cos(P(h)_bn, g_bn)``.

    Each image has two times t and s, drawn alike, and a mask that takes every token with probability ``mask_ratio``.
    The denoiser gets masked tokens at time s and the others at t, with one noise, and predicts each token's target.
    ``h`` are the tokens that leave a block in this pass. ``g`` are the tokens that leave a later block of the averaged
    model, which gets the whole image at ``min(t, s)``. The mean is over all tokens, masked or not.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SelfFlowSettings


class SelfTranscendence(Regularizer):
    """Self-Transcendence (2601.07773): ``-mean_bn 1[low <= t_bn <= high] cos(P(h)_bn, f_bn)``.

    ``h`` are the tokens that leave a block of the model that trains. ``f = u + s (c - u)`` are the guided tokens of a
    later block of a frozen model with the same input: c are its conditional tokens, u its unconditional ones, and s is
    the guidance. The mean is over all tokens; those whose time is out of range count as 0, so that the loss does not
    depend on the micro-batch. ``loss: mse`` has the mean squared error over the channels in place of minus the cosine.
    All tokens of an image have one time, unless another regularizer asks for two.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SelfTranscendenceSettings
    settings: SelfTranscendenceSettings

    def __init__(self, settings: SelfTranscendenceSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (student,), (teacher,) = shapes.taps, shapes.frozen_taps
        self.projector = Projector(student, teacher, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the mean loss of the tokens in range; the mean cosine of all tokens is a part.

        Args:
            signals: one tap ``(B, N, D)``, one tap of the frozen model ``(B, M, D)``, and the times
                ``(B,)``, or ``(B, 1, h, w)`` on the student's grid.
            step: optimizer steps already taken.
        """
        (student,), (teacher,), times = signals.taps, signals.frozen_taps, signals.times
        assert times is not None
        projected = self.projector.project(student).values
        target = teacher.resample(student.grid).values.detach()
        cosine = token_cosine(projected, target)
        is_used = ((times >= self.settings.low) & (times <= self.settings.high)).reshape(len(times), -1)
        loss = -cosine if self.settings.loss == "cosine" else (projected.float() - target.float()).square().mean(-1)
        return Loss((loss * is_used).mean(1).mean(), {"cosine": cosine.detach().mean(1).mean()})


class SRA2(Regularizer):
    """SRA2 (2601.17830): ``mean_bnk smooth_l1(P(h)_bnk - z_bnk)`` with ``beta`` 0.05.

    ``z_bn`` are the latents of the square of cells of token n; ``smooth_l1(d)`` is ``d^2 / (2 beta)`` where
    ``|d| < beta``, else ``|d| - beta / 2``. With ``normalize`` the latents of every image have mean 0 and standard
    deviation 1 over all of their values; the paper takes them as the VAE gives them. Users of ports saw a loss of 60
    beside a denoising loss of 0.06: the part ``ratio`` is the loss over the mean squared error of the prediction.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SRA2Settings
    settings: SRA2Settings

    def __init__(self, settings: SRA2Settings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (width,), (stride,) = shapes.taps, shapes.strides
        self.projector = Projector(width, shapes.latents * stride**2, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the smooth L1 loss; its ratio to the denoising loss is a part.

        Args:
            signals: one tap ``(B, N, D)``, the latents ``(B, C, H, W)``, or of clips, and the prediction.
            step: optimizer steps already taken.

        Raises:
            ValueError: the tokens' grid does not divide the latents.
        """
        (student,), latents, prediction = signals.taps, signals.latents, signals.prediction
        assert latents is not None
        assert prediction is not None
        target = latents_of_tokens(_standardize(latents) if self.settings.normalize else latents.float(), student.grid)
        projected = self.projector.project(student).values.float()
        value = functional.smooth_l1_loss(projected, target.values, beta=self.settings.beta)
        with torch.no_grad():
            denoising = functional.mse_loss(prediction.output.float(), prediction.target.float())
            ratio = value / denoising.clamp_min(torch.finfo(torch.float32).tiny)
        return Loss(value, {"ratio": ratio})


def latents_of_tokens(latents: torch.Tensor, grid: Grid) -> Tokens:
    """Return for every token of a grid the latents of its square of cells, ``(B, h * w, C * s * s)``; clips by frame.

    Args:
        latents: ``(B, C, H, W)``, or of clips ``(B, C, F, H, W)``.
        grid: ``(h, w)`` with H = s * h and W = s * w.

    Raises:
        ValueError: the grid does not divide the latents.
    """
    if latents.ndim == 5:
        return latents_of_tokens(latents.transpose(1, 2).flatten(0, 1), grid).as_clips(latents.shape[2])
    height, width = latents.shape[-2:]
    stride = height // grid[0]
    if (grid[0] * stride, grid[1] * stride) != (height, width):
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} tokens does not divide latents of {height}x{width}")
    return flatten_map(functional.pixel_unshuffle(latents, stride))


def _standardize(latents: torch.Tensor) -> torch.Tensor:
    values = latents.float()
    std, mean = torch.std_mean(values, dim=tuple(range(1, values.ndim)), keepdim=True, correction=0)
    return (values - mean) / std.clamp_min(1e-6)


class Dispersive(Regularizer):
    """Dispersive loss (2506.09027): a contrastive loss without positive pairs.

    With ``z_i`` all tokens of image i as one vector of n numbers and ``t`` the temperature:

    - ``infonce_l2``: ``log mean_ij exp(-|z_i - z_j|^2 / (n t))``, whose mean is over all B * B pairs, also of an
      image with itself, as in the released code;
    - ``infonce_cosine``: ``log mean_ij exp(cos(z_i, z_j) / t)`` over the same pairs;
    - ``hinge``: ``mean_(i != j) max(0, margin - |z_i - z_j|^2 / n)^2``.

    The pairs are those of one forward pass in all processes: the loss depends on the micro-batch, not on the number of
    processes. Distances are divided by n as in the released code, so that one temperature serves all widths.
    """

    Settings: ClassVar[type[RegularizerSettings]] = DispersiveSettings
    settings: DispersiveSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the loss; the mean distance of two different images is a part.

        Args:
            signals: one tap ``(B, N, D)``.
            step: optimizer steps already taken.

        Raises:
            ValueError: there is a single image.
        """
        (tokens,) = signals.taps
        images = gather(tokens.values.float().flatten(1))
        count = len(images)
        if count < 2:
            raise ValueError("dispersive compares the images of one forward pass; there is a single one")
        is_cosine = self.settings.loss == "infonce_cosine"
        # Unit vectors are 2 - 2 cos apart, squared.
        vectors = functional.normalize(images) if is_cosine else images
        distances = torch.pdist(vectors).square() / (2 if is_cosine else images.shape[1])
        parts = {"distance": distances.detach().mean()}
        if self.settings.loss == "hinge":
            return Loss((self.settings.margin - distances).clamp_min(0).square().mean(), parts)
        # Every pair twice, and every image with itself at distance 0.
        similar = 2 * (-distances / self.settings.temperature).exp().sum() + count
        nearest = 1 / self.settings.temperature if is_cosine else 0.0
        return Loss((similar / count**2).log() + nearest, parts)
