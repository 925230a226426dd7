"""Write a run's denoiser and its samples for use outside repa-lab."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from repa_lab.data.sources import as_images
from repa_lab.errors import InputError
from repa_lab.metrics.reference import write_images
from repa_lab.models.pretrained import DiffusersDenoiser
from repa_lab.models.scratch import Input
from repa_lab.runs import RunDirectory, files
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.batches import open_data
from repa_lab.training.checkpoint import INPUT_FILE, load_weights, newest_checkpoint
from repa_lab.training.device import as_trained, computing_in, measuring_precision, pick_device
from repa_lab.training.diffusion import shares
from repa_lab.training.evaluate import DivergedError, real_images
from repa_lab.training.model import build_denoiser, open_trained
from repa_lab.training.resolve import metric_names, numbers_of, protocols_of

Progress = Callable[[int, int], None]


class ExportError(InputError):
    """The requested files cannot be written: the place is in use, or the run has no such number or images."""


class WrittenSamples(NamedTuple):
    """The step of written samples, the full name of the number measured on them, and its value if the run has one."""

    step: int
    metric: str
    value: float | None


def export_model(directory: RunDirectory, folder: Path, weights: str = "ema") -> int:
    """Write the denoiser of a run's newest checkpoint into a new folder, without projector or optimizer.

    Return the step. ``weights`` are ``ema``, the averaged ones, or ``last``, those of the last step.

    A ``unet`` becomes a folder for diffusers' `UNet2DModel.from_pretrained`; a ``sit`` becomes ``model.safetensors``
    and a ``config.json`` of :class:`repa_lab.models.sit.SiTConfig`. A pretrained denoiser that was trained in full
    becomes a folder of its diffusers class. A LoRA becomes the file that the pipeline's `load_lora_weights` takes, or,
    if the pipeline has no such method, a folder for `PeftModel.from_pretrained`.

    Raises:
        NoWeightsError: the run has no checkpoint, or ``weights`` is neither.
        ExportError: the folder is not empty.
    """
    step, checkpoint = newest_checkpoint(directory, weights)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"'{folder}' is not empty; name a new folder")
    run = Run.read(directory)
    given = files.read_json(checkpoint / INPUT_FILE)
    shape = Input(given["channels"], tuple(given["size"]), given["num_classes"]) if given else None
    denoiser = build_denoiser(run.config, shape, run.seed)
    load_weights(denoiser, checkpoint, weights)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(denoiser, DiffusersDenoiser):
        denoiser.export(folder, run.config.model.rank if run.config.model.train == "lora" else None)
    else:
        denoiser.export(folder)
    return step


def write_samples(
    directory: RunDirectory,
    path: Path,
    cache: Path,
    metric: str | None = None,
    weights: str = "ema",
    progress: Progress = lambda done, total: None,
) -> WrittenSamples:
    """Draw the samples that a number is measured on from a run's newest checkpoint, as one npz for ADM's evaluator.

    Args:
        metric: full name of the number; None takes the first one of the milestone protocol, or else of the usual one.
        progress: called with the number of images drawn and of all images.

    Raises:
        ExportError: the file exists, or the run measures no such number.
        NoWeightsError: the run has no checkpoint.
        DivergedError: a sample is not finite.
    """
    _require_new(path)
    step, checkpoint = newest_checkpoint(directory, weights)
    run = Run.read(directory)
    by_name, last = {name: protocol for name, protocol, *_ in numbers_of(run.config)}, protocols_of(run.config)[-1]
    chosen = metric or next(name for name, protocol, *_ in numbers_of(run.config) if protocol == last)
    if chosen not in by_name:
        names = ", ".join(metric_names(run.config))
        raise ExportError(f"run {run.run_id} measures no '{chosen}'; it measures: {names}")
    protocol, recorded = by_name[chosen], directory.protocols.get(chosen)
    if recorded is not None:
        precision = str(recorded.get("precision", "fp32"))
    else:  # the precision in which the number would have been measured
        precision = measuring_precision(run.config.evaluate, str(directory.provenance["options"]["precision"]))
    wanted = RunOptions.model_validate({"precision": "fp32" if precision == "tf32" else precision})
    options = as_trained(wanted, directory)
    device = pick_device(options)
    model = open_trained(run, checkpoint, weights, open_data(run.config, cache, device), options, cache, device)
    sampler = model.sampler(protocol)

    def batches() -> Iterator[torch.Tensor]:
        for index in shares(protocol.samples, protocol.batch_size):
            pixels = sampler(index)
            if pixels is None:
                raise DivergedError("the denoiser draws samples that are not finite")
            yield as_images(pixels)

    with computing_in(model.denoiser, precision, device):
        _write(path, batches(), protocol.samples * max(run.config.data.clip_frames, 1), progress)
    values = [row[chosen] for row in directory.rows() if row["step"] == step and chosen in row]
    return WrittenSamples(step, chosen, values[-1] if values and weights == "ema" else None)


def write_real(directory: RunDirectory, path: Path, cache: Path, progress: Progress = lambda done, total: None) -> int:
    """Write the training images that samples are compared with, in order, as an npz, and return their number.

    Raises:
        ExportError: the file exists, or the images have several sizes.
        DataError: the data is not available any more.
    """
    _require_new(path)
    config = Run.read(directory).config
    real = real_images(open_data(config, cache, pick_device(RunOptions())))
    if real.size is None:
        raise ExportError("the training images have several sizes, and such a file holds images of one size")

    _write(path, real.batches(), real.count, progress)
    return real.count


def _write(path: Path, batches: Iterable[torch.Tensor], count: int, progress: Progress) -> None:
    def counted() -> Iterator[torch.Tensor]:
        done = 0
        for pixels in batches:
            done += len(pixels)
            progress(done, count)
            yield pixels

    write_images(path, counted(), count)


def _require_new(path: Path) -> None:
    if path.exists():
        raise ExportError(f"'{path}' exists; name a new file")
