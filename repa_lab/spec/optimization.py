"""The optimizer and its learning rate over steps."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from repa_lab.settings import AS_TUPLE, Count, Fraction, NotNegative, Settings

_MOMENTS = ("betas", "eps")
# Classes of torch.optim by name, and which of the settings below each takes.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "AdamW": _MOMENTS,
    "Adam": _MOMENTS,
    "Adamax": _MOMENTS,
    "NAdam": _MOMENTS,
    "RAdam": _MOMENTS,
    "RMSprop": ("eps", "momentum"),
    "SGD": ("momentum",),
    "Adagrad": ("eps",),
    "Adadelta": ("eps",),
    "Adafactor": (),
}
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], AS_TUPLE]


class OptimizerSettings(Settings):
    """A class of torch.optim; what is null is the class's own default."""

    type: Literal["AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "Adagrad", "Adadelta", "Adafactor"] = (
        "AdamW"
    )
    """The class."""
    betas: Betas | None = None
    """Decays of the averages of the gradient and of its square."""
    eps: NotNegative | None = None
    """Added to the denominator."""
    momentum: Fraction | None = None
    """Momentum of `SGD` and `RMSprop`."""

    @model_validator(mode="after")
    def _takes_what_is_given(self) -> Self:
        for name in ("betas", "eps", "momentum"):
            if getattr(self, name) is not None and name not in OPTIMIZERS[self.type]:
                takes = ", ".join(OPTIMIZERS[self.type]) or "none of them"
                raise ValueError(f"{self.type} has no {name}; of betas, eps and momentum it takes {takes}")
        return self

    @property
    def arguments(self) -> dict[str, object]:
        """What is given, as arguments of the class."""
        given = {name: getattr(self, name) for name in OPTIMIZERS[self.type]}
        return {name: value for name, value in given.items() if value is not None}


class LearningRateSettings(Settings):
    """The learning rate over steps, as a share of `train.lr`: a linear warm-up from 0, then a decay to `end`."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    """The shape of the decay."""
    warmup_steps: Count = 0
    """Steps over which the rate rises from 0; the first step takes a share of 1 / (warmup_steps + 1)."""
    decay_steps: Count = 0
    """The step at which the decay ends, counted from 0, warm-up included; 0 is the end of training."""
    end: Fraction = 0.0
    """The share of `train.lr` at the end of the decay."""

    @model_validator(mode="after")
    def _decay_ends_after_warmup(self) -> Self:
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")
        return self

    def depends_on_length(self) -> bool:
        """Return whether the rate at a step depends on how long the training is."""
        return self.type != "constant" and not self.decay_steps


class LossWeightSettings(Settings):
    """The weight of a sample's denoising loss by its noise."""

    type: Literal["none", "min_snr"] = "none"
    """`min_snr` (2303.09556) weights the error of the clean image by the smaller of the signal-to-noise ratio and `gamma`."""
    gamma: Annotated[float, Field(gt=0)] = 5.0
    """The largest signal-to-noise ratio that counts."""
