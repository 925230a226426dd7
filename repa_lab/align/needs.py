"""What a regularizer needs of a training step, what it adds to one, and what it has to fit. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from repa_lab.settings import BlockIndex

if TYPE_CHECKING:
    from repa_lab.align.settings import EncoderSettings


@dataclass(frozen=True)
class FrozenModel:
    """An earlier model of the run's own architecture, which never changes.

    Attributes:
        weights: a ``model.safetensors`` of `repa-lab export`; None is the model before its first step.
        guidance: the scale s of classifier-free guidance of the tokens, ``null + s * (conditional - null)``; at 1 the
            unconditional pass is left out.
    """

    weights: str | None = None
    guidance: float = 1.0


@dataclass(frozen=True)
class Needs:
    """The signals that a regularizer needs; no others are captured or computed.

    Attributes:
        taps: blocks of the denoiser whose output is captured, 0-based, or ``mid``.
        encoders: encoders whose patch tokens are the target.
        ema_taps: blocks of the averaged model, which then also runs on the same images with the same noise and
            conditioning, without gradient.
        latents: whether the clean latents (or pixels) of the batch are needed.
        prediction: whether the denoiser's output and its target are needed.
        attention: blocks of the denoiser whose queries and keys are captured.
        encoder_attention: blocks of every encoder whose queries and keys between patches are captured, as Python's
            indices: -1 is the last. They are not cached, so the encoders must be asked in every step (`cache: false`).
        less_noise: the averaged model's time is lower than the denoiser's by up to this much, drawn uniformly for each
            image.
        token_times: the share of an image's tokens that the denoiser gets at a second time, drawn like the first; the
            averaged model then gets the lower of the two times everywhere.
        frozen_taps: blocks of ``frozen``, which then also runs on the denoiser's own input, without gradient.
        frozen: the frozen model of ``frozen_taps``.
    """

    taps: tuple[BlockIndex | None, ...] = ()
    encoders: tuple[EncoderSettings, ...] = ()
    ema_taps: tuple[BlockIndex | None, ...] = ()
    latents: bool = False
    prediction: bool = False
    attention: tuple[BlockIndex | None, ...] = ()
    encoder_attention: tuple[int, ...] = ()
    less_noise: float = 0.0
    token_times: float = 0.0
    frozen_taps: tuple[BlockIndex | None, ...] = ()
    frozen: FrozenModel = FrozenModel()

    @property
    def blocks(self) -> tuple[BlockIndex | None, ...]:
        """Every block whose output is captured in some pass, each once."""
        return tuple(dict.fromkeys((*self.taps, *self.ema_taps, *self.frozen_taps)))

    @property
    def extra_passes(self) -> int:
        """The number of forward passes beside the denoiser's own."""
        frozen = 2 if self.frozen.guidance != 1 else 1
        return int(bool(self.ema_taps)) + (frozen if self.frozen_taps else 0)


class TokenSize(NamedTuple):
    """The size of one image's tokens, or of its latents: their width or channels, and the number of tokens or cells."""

    dim: int
    number: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of one image's signals, as planning knows them; the latents are the pixels without a VAE.

    ``heads`` is that of the denoiser's attention, and 0 if it has none.
    """

    taps: tuple[TokenSize, ...]
    encoders: tuple[TokenSize, ...]
    latents: TokenSize
    heads: int = 0


class Overhead(NamedTuple):
    """What a regularizer adds to a training step beside the signals that it needs.

    Attributes:
        parameters: trained parameters.
        macs: multiply-adds of the forward pass for one image.
        hidden: numbers between the layers of projectors that the backward pass needs for one image.
        maps: float32 numbers in maps of attention that the backward pass needs for one image.
    """

    parameters: int
    macs: float
    hidden: float = 0.0
    maps: float = 0.0


@dataclass(frozen=True)
class TrainingFacts:
    """What a regularizer's settings have to fit.

    Attributes:
        depth: blocks of the denoiser; None if that is not known yet.
        images: images of one forward pass of one process.
        is_pretrained: whether the denoiser is trained before the first step.
        frames: frames of a clip in the denoiser; 1 for images.
    """

    depth: int | None
    images: int
    is_pretrained: bool
    frames: int = 1
