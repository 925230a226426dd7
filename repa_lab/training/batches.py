"""The data of a run: its images, and the batch of every step with the random streams that decide it.

Every draw derives from (seed, stream, images seen). Nothing has to be saved to resume, and neither the number of
processes nor the micro-batch changes a draw. Arms with one seed are paired: they see the same images in the same order,
with the same noise, times and dropped labels.

Numbers are drawn where they are used: the choice of images, mirrored or not, and of dropped labels on the CPU; times
and noise on the device that trains. Another kind of device draws other times and noise.
"""

from __future__ import annotations

import functools
import hashlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch.utils.data import DataLoader, Dataset

from repa_lab.align.settings import EncoderSettings
from repa_lab.data import DataError
from repa_lab.data.cache import Progress
from repa_lab.data.latents import LatentSpace, PixelSpace, Reconstructions, Space, latent_space, load_autoencoder
from repa_lab.data.settings import SOURCES, SourceSettings
from repa_lab.data.sources import Flips, LatentFrames, Source, Split, groups, split
from repa_lab.encoders.targets import Reader
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import TEXT_LENGTHS, pipeline_of
from repa_lab.models.released import SCALING, PretrainedError, locate, problem_with, read_json
from repa_lab.models.scratch import Input
from repa_lab.spec import ModelConfig, RunConfig

_BLOCK = 1024  # steps whose image sizes are drawn together
_CPU = torch.device("cpu")
# Takes the name of a long task and returns a callback for its progress.
Announce = Callable[[str], Progress]
Draw = Callable[[int, torch.Generator], torch.Tensor]
# What a denoiser is given beside the noisy image and the time, by argument name, one row for each image.
Condition = dict[str, torch.Tensor]
# Returns the conditioning of images ``(B,)``, null where the second argument ``(B,)`` says so.
Conditioning = Callable[[torch.Tensor, torch.Tensor], Condition]


@dataclass(frozen=True)
class Images:
    """The images of a run. With ``data.flip``, image ``len(base) + i`` of the source is image i mirrored.

    Attributes:
        source: the images, mirrored ones included.
        split: numbers of the training and the held-out images; never of mirrored ones.
        space: pixels or latents.
    """

    source: Source
    split: Split
    space: Space

    @property
    def base(self) -> Source:
        """The images without mirrored ones."""
        return self.source.base if isinstance(self.source, Flips) else self.source

    @property
    def frame_stride(self) -> int:
        """Frames of a clip per latent frame after the first, or 1: also of images, and of clips of one frame."""
        frames = self.source.clip_frames
        latent = self.space.shape(self.split.train)[1] if frames else 1
        return (frames - 1) // (latent - 1) if latent > 1 else 1

    @property
    def input(self) -> Input:
        """The shape and the classes that a denoiser from scratch is built for; the images must have one size."""
        channels, height, width = self.space.shape(self.split.train)
        return Input(channels, (height, width), self.source.num_classes)


def open_data(config: RunConfig, cache: Path, device: torch.device, announce: Announce | None = None) -> Images:
    """Open the data of a run; a pretrained run uses its pipeline's VAE unless `data.vae` names another.

    Raises:
        DataError: the data cannot be used.
        PretrainedError: the pipeline cannot be loaded.
    """
    if config.model.pretrained is None:
        return open_images(config.data, cache, announce, device)
    folder, pipeline = pretrained_folder(config.model), pipeline_of(FAMILIES[config.model.family])
    if config.data.vae is not None:
        given = load_autoencoder(config.data.vae, "vae").model.config
        needed = read_json(folder / "vae" / "config.json") or {}
        missing = [name for name in SCALING if needed.get(name) is not None and given.get(name) is None]
        if missing:  # refuse it before encoding: the pipeline scales latents by these numbers when it samples
            message = f"the config of '{config.data.vae}' lacks {', '.join(missing)}, which the pipeline's own VAE has"
            raise DataError("vae", f"{message}; sampling scales latents by it")
    return open_images(config.data, cache, announce, device, str(folder), pipeline.shifted)


def open_images(
    data: SourceSettings,
    cache: Path,
    announce: Announce | None = None,
    device: torch.device = _CPU,
    vae: str | None = None,
    shifted: bool = True,
) -> Images:
    """Open the images of a run and compute the latents that the cache lacks.

    Args:
        vae: the autoencoder, or the pipeline with it, if the settings name none.
        shifted: see :class:`repa_lab.data.latents.Autoencoder`.
    """
    vae = data.vae or vae
    if data.is_unset:
        raise DataError("path", "no folder is given; set data.path")
    base = SOURCES[data.source].open(data, cache)
    images = split(len(base), data.held_out(len(base)))
    source = Flips(base) if data.flip else base
    progress = announce("latents") if announce and vae else None
    space = latent_space(source, vae, cache, progress, device, shifted) if vae else PixelSpace(source)
    return Images(source, images, space)


def pixels_for(encoder: EncoderSettings, images: Images, device: torch.device = _CPU) -> Source:
    """Return what an encoder sees, by its ``pixels``: the images, or reconstructions by the VAE or a tiny autoencoder.

    Of clips the encoder sees the frames that stand for latent ones: :class:`repa_lab.data.sources.LatentFrames`.

    Raises:
        DataError: there are no latents (field ``vae``), or the tiny autoencoder does not fit them (field ``tae``).
    """
    source, space = images.source, images.space
    if encoder.pixels != "image":
        if not isinstance(space, LatentSpace):
            message = f"pixels: {encoder.pixels} decodes latents, and there is no VAE; set data.vae, or pixels: image"
            raise DataError("vae", message)
        decoder = space.vae if encoder.pixels == "vae" else load_autoencoder(str(encoder.tae), "tae")
        source = Reconstructions(source, space, decoder, device)
    return LatentFrames(source, images.frame_stride) if images.frame_stride > 1 else source


# Cached because asking the hub takes seconds.
_located = functools.cache(locate)


def pretrained_folder(model: ModelConfig) -> Path:
    """Return the folder of a run's pretrained pipeline; PretrainedError if there is none of the run's family."""
    assert model.pretrained is not None
    folder = _located(model.pretrained, model.revision)
    if message := problem_with(folder, FAMILIES[model.family]):
        raise PretrainedError(message)
    return folder


def stream_seed(seed: int, stream: str, *counters: int) -> int:
    """Return a 63-bit seed for a named stream at the given counters."""
    text = f"{seed}/{stream}/" + "/".join(map(str, counters))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: str, *counters: int, device: torch.device = _CPU) -> torch.Generator:
    """Return a device's generator for a named stream; drawing on the CPU gives every device the same numbers."""
    return torch.Generator(device).manual_seed(stream_seed(seed, stream, *counters))


@contextmanager
def seeded(seed: int, stream: str) -> Iterator[None]:
    """Seed torch's global generator for a stream and restore it afterwards; weight initialisation draws from it."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, stream))
        yield


class Order:
    """The order in which the images ``index`` ``(n,)`` are seen: endless epochs, each a new permutation."""

    def __init__(self, index: torch.Tensor, seed: int, stream: str = "data") -> None:
        self._index, self._seed, self._stream = index, seed, stream
        self._epoch, self._permuted = -1, index

    def take(self, start: int, count: int) -> torch.Tensor:
        """Return the ``count`` images from position ``start`` on, counted since the run began, ``(count,)``."""
        taken = []
        while count:
            epoch, offset = divmod(start, len(self._index))
            if epoch != self._epoch:
                order = torch.randperm(len(self._index), generator=generator(self._seed, self._stream, epoch))
                self._epoch, self._permuted = epoch, self._index[order]
            taken.append(self._permuted[offset : offset + count])
            start, count = start + len(taken[-1]), count - len(taken[-1])
        return torch.cat(taken)


class BatchOrder:
    """The images of every step, all of one size; ``members`` are those of each size, ``(n,)``.

    With several sizes, the size of a step is drawn with probabilities proportional to the numbers of images, and the
    images of each size follow their own :class:`Order`. In the long run every image is seen equally often. Only the
    current block of draws is kept; a step before it starts the count of earlier steps again.
    """

    def __init__(self, members: Sequence[torch.Tensor], seed: int) -> None:
        streams = ["data"] if len(members) == 1 else [f"data/{number}" for number in range(len(members))]
        self._orders = [Order(index, seed, stream) for index, stream in zip(members, streams, strict=True)]
        self._shares, self._seed = torch.tensor([float(len(index)) for index in members]), seed
        self._start_block(0, torch.zeros(len(members), dtype=torch.long))

    def take(self, step: int, count: int) -> torch.Tensor:
        """Return the images of a step, ``(count,)``."""
        if len(self._orders) == 1:
            return self._orders[0].take(step * count, count)
        block, offset = divmod(step, _BLOCK)
        if block < self._block:
            self._start_block(0, torch.zeros_like(self._earlier))
        while block > self._block:
            self._start_block(self._block + 1, self._earlier + self._sizes.bincount(minlength=len(self._orders)))
        size = int(self._sizes[offset])
        earlier = int(self._earlier[size] + (self._sizes[:offset] == size).sum())
        return self._orders[size].take(earlier * count, count)

    def _start_block(self, block: int, earlier: torch.Tensor) -> None:
        """Draw the number of the size of every step of a block; ``earlier`` counts the steps of each size before."""
        draw = generator(self._seed, "sizes", block)
        self._block, self._earlier = block, earlier
        self._sizes = torch.multinomial(self._shares, _BLOCK, replacement=True, generator=draw)


class HostBatch(NamedTuple):
    """What is read for a step in the memory of the host, before times and noise are drawn.

    Attributes:
        step: number of the step.
        ids: numbers of the images, ``(B,)``; they stay on the CPU.
        stored: the images as their space stores them, ``(B, ...)``: pixels, or moments of latents.
        condition: class or caption embeddings, some of them already dropped.
        loaded: for each encoder, the cached features or pixels that its targets are made from; None if not read ahead.
    """

    step: int
    ids: torch.Tensor
    stored: torch.Tensor
    condition: Condition
    loaded: tuple[torch.Tensor | None, ...] = ()

    def to(self, device: torch.device) -> HostBatch:
        """Return the batch on a device, copied without waiting from pinned memory.

        ``ids`` and the lengths of texts stay on the CPU, where reading them waits for nothing.
        """
        moved = send_to_device((self.stored, self.condition, self.loaded), device, True, TEXT_LENGTHS)
        return HostBatch(self.step, self.ids, *moved)


class Batch(NamedTuple):
    """The inputs of one step; see also :class:`HostBatch`.

    Attributes:
        x: clean images or latents, ``(B, C, H, W)``.
        noise: ``(B, C, H, W)``.
        t: times from 0 (data) to 1 (noise), ``(B,)``.
        draws: further random numbers that regularizers need, by name, ``(B, ...)``.
    """

    ids: torch.Tensor
    x: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    condition: Condition
    loaded: tuple[torch.Tensor | None, ...] = ()
    draws: Mapping[str, torch.Tensor] = {}

    def split(self, size: int | None) -> list[Batch]:
        """Return micro-batches of at most ``size`` images; None keeps the batch whole."""
        if size is None or size >= len(self.ids):
            return [self]
        return [slice_tensors(self, slice(start, start + size)) for start in range(0, len(self.ids), size)]


class Steps(Dataset[HostBatch]):
    """The batch of every step by its number, a function of (config, seed, step) and the kind of device alone.

    Args:
        times: draws the times of a batch.
        part: which of how many equal parts of each batch belongs to this process.
        readers: load what each encoder's targets are made from; see :class:`repa_lab.encoders.targets.Targets`.
        weights: the regularizers' weights by step; nothing is read ahead where all of them are 0.
        draws: further random numbers by name: functions of the batch size and a random stream of that name.
    """

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        images: Images,
        times: Draw,
        conditioning: Conditioning,
        part: tuple[int, int] = (0, 1),
        readers: Sequence[Reader | None] = (),
        weights: Sequence[Callable[[int], float]] = (),
        draws: Mapping[str, Draw] | None = None,
    ) -> None:
        self._train, self._seed, self._images, self._times = config.train, seed, images, times
        self._conditioning, self._readers, self._weights, self._draws = conditioning, readers, weights, draws or {}
        train = images.split.train
        self._order = BatchOrder([train[group] for group in groups(images.source.sizes[train])], seed)
        number, parts = part
        size = config.train.batch_size // parts
        self._part = slice(number * size, (number + 1) * size)

    def __len__(self) -> int:
        return self._train.steps

    def __getitem__(self, step: int) -> HostBatch:
        size, part = self._train.batch_size, self._part
        ids = self._order.take(step, size)
        if len(self._images.source) > (count := len(self._images.base)):  # image i + count is image i mirrored
            ids = ids + count * (torch.rand(size, generator=generator(self._seed, "flips", step * size)) < 0.5)
        (_, dropped, _), ids = self._draw(step, _CPU), ids[part]
        is_read = any(weight(step) != 0 for weight in self._weights)
        loaded = tuple(read and read(ids) for read in self._readers) if is_read else ()
        return HostBatch(step, ids, self._images.space.read(ids), self._conditioning(ids, dropped[part]), loaded)

    def draw(self, host: HostBatch) -> Batch:
        """Draw the times and the noise of a batch on the device that the batch is on.

        Every process draws the numbers of the whole batch and takes its part, so that their number changes nothing.
        """
        size, space, part = self._train.batch_size, self._images.space, self._part
        t, _, draw = self._draw(host.step, host.stored.device)
        encoding = space.draw(host.stored, size, draw)
        x = space.encode(host.stored, None if encoding is None else encoding[part])
        noise = torch.randn((size, *x.shape[1:]), generator=draw, device=draw.device)
        draws = {
            name: draw_for(size, generator(self._seed, name, host.step * size, device=draw.device))[part]
            for name, draw_for in self._draws.items()
        }
        return Batch(host.ids, x, noise[part], t[part], host.condition, host.loaded, draws)

    def _draw(self, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
        """Return the times and the dropped labels of a whole batch, ``(batch_size,)``, and the stream of its noise."""
        size = self._train.batch_size
        draw = generator(self._seed, "noise", step * size, device=device)
        t = self._times(size, draw)
        return t, torch.rand(size, generator=draw, device=device) < self._train.label_dropout, draw

    def load(self, steps: Iterable[int], device: torch.device, workers: int) -> Iterator[Batch]:
        """Yield the batches of some steps on a device, read by so many other processes, or in this one.

        Raises:
            DataError: an image or a cache cannot be read, or a process that reads has ended.
        """
        is_gpu = device.type == "cuda"
        if workers == 0 and not is_gpu:  # a loader would take longer than reading small images does
            yield from (self.draw(self[step]) for step in steps)
            return
        loader = DataLoader(_Errors(self), batch_size=None, sampler=steps, num_workers=workers, pin_memory=is_gpu)
        read = _raising(loader)
        for host in _copied_ahead(read, device) if is_gpu else read:
            yield self.draw(host)


class _Errors(Dataset[HostBatch | DataError]):
    """The batches of some steps, or what is wrong with their data; a loader would make tracebacks of such errors."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __getitem__(self, step: int) -> HostBatch | DataError:
        try:
            return self._steps[step]
        except DataError as error:
            return error


def _raising(loader: Iterable[HostBatch | DataError]) -> Iterator[HostBatch]:
    """Yield what a loader yields, and raise what is wrong with the data or with the loader's processes."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # The loader's handler would raise the end of a worker anywhere in a step, again and again.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    while True:
        end = ""
        try:
            batch = next(batches, None)
        except (RuntimeError, ConnectionError, EOFError) as error:  # EOF, because a batch is fetched from its process
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            end = (str(error) or type(error).__name__).splitlines()[0].strip(" .")
        if end:
            del batches  # ends the other processes
            advice = "if memory or shared memory (/dev/shm) is short, lower run.data_workers"
            message = f"a process that loads data has ended ({end}): {advice}; start again, and the run goes on"
            raise DataError("data_workers", message)
        if batch is None:
            return
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _copied_ahead(batches: Iterable[HostBatch], device: torch.device) -> Iterator[HostBatch]:
    """Copy batches from pinned memory to a GPU on a stream of their own, each while the step before it runs."""
    stream = torch.cuda.Stream(device)
    copied = deque[tuple[HostBatch, torch.cuda.Event]]()

    def arrived() -> HostBatch:
        batch, event = copied.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for values in (batch.stored, *batch.condition.values(), *batch.loaded):
            if values is not None and values.is_cuda:
                values.record_stream(current)  # else its memory could be reused before the step has read it
        return batch

    for batch in batches:
        with torch.cuda.stream(stream):
            copied.append((batch.to(device), stream.record_event()))
        if len(copied) > 1:
            yield arrived()
    while copied:
        yield arrived()
