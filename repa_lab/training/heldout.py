"""Held-out images as a denoiser is shown them when it is measured: the same noise for every run, and told nothing of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from repa_lab.data.sources import groups
from repa_lab.spec import EvaluateConfig
from repa_lab.training.images import Images
from repa_lab.training.model import Model
from repa_lab.training.streams import generator

# Held-out images are measured under the same noise in every run, whatever its seed.
MEASURING_SEED = 0
_USUAL_BATCH: int = EvaluateConfig.model_fields["batch_size"].default


def held_out_batches(images: Images, chosen: torch.Tensor, at_once: int) -> Iterator[torch.Tensor]:
    """The images ``chosen`` ``(n,)``, size by size, at most ``at_once`` at a time: each batch has its noise."""
    members = [chosen[group] for group in groups(images.source.sizes[chosen])]
    return (part for group in members for part in group.split(at_once))


def noise_protocol(config: EvaluateConfig, images: int) -> dict[str, int]:
    """What the noise of so many images depends on beside them: it is drawn a batch at a time.

    Nothing where the usual size would draw the same: that goes without saying, as older runs have it.
    """
    batch = min(config.batch_size, images)
    return {} if batch == min(_USUAL_BATCH, images) else {"noise_batch": batch}


def image_means(values: torch.Tensor) -> torch.Tensor:
    """Tokens ``(B, N, D)`` averaged over each image, ``(B, D)`` in float32: what linear CKA and its like compare."""
    return values.float().mean(dim=1)


def show(model: Model, images: Images, index: torch.Tensor, timestep: float, device: torch.device) -> None:
    """Run the denoiser on a batch of held-out images at a time, for what its taps capture; nothing is returned.

    Args:
        model: its denoiser stands on the device.
        images: the data.
        index: a batch of :func:`held_out_batches`, ``(b,)``.
        timestep: 0 is data, 1 is noise.
        device: where to run.
    """
    draw = generator(MEASURING_SEED, "held-out", int(index[0]))
    x = images.space.encode(index, images.space.draw(index, draw))
    noise = torch.randn(x.shape, generator=draw)
    t = torch.full((len(x),), timestep)
    x_t, _ = model.process.corrupt(x, noise, t)
    nothing = model.conditioning(index, torch.ones(len(index), dtype=torch.bool))
    condition = {name: value.to(device) for name, value in nothing.items()}
    model.denoiser(x_t.to(device), t.to(device), **condition)
