"""The batch of every training step, and the named random streams that decide its images, noise and times.

Every draw derives from (seed, stream, images seen). Nothing has to be saved to resume, and neither the number of
processes nor the micro-batch changes a draw. Arms with one seed are paired: they see the same images in the same order,
with the same noise, times and dropped labels.

Numbers are drawn where they are used: the choice of images, mirrored or not, and of dropped labels on the CPU; times
and noise on the device that trains. Another kind of device draws other times and noise.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from repa_lab.data import DataError
from repa_lab.data.sources import groups
from repa_lab.encoders.targets import Reader
from repa_lab.models.family import TEXT_LENGTHS
from repa_lab.spec import RunConfig
from repa_lab.training.data import Condition, Conditioning, Images
from repa_lab.training.diffusion import Process

_BLOCK = 1024  # steps whose image sizes are drawn together
_CPU = torch.device("cpu")
Draw = Callable[[int, torch.Generator], torch.Tensor]


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
    """The order in which images are seen: an endless sequence of epochs, each a new permutation.

    Args:
        index: the images to train on, ``(n,)``.
        stream: name of the stream that the permutations are drawn from.
    """

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
    """The images of every step, all of one size.

    With several sizes, the size of a step is drawn with probabilities proportional to the numbers of images, and the
    images of each size follow their own :class:`Order`. In the long run every image is seen equally often. Only the
    current block of draws is kept; a step before it starts the count of earlier steps again.

    Args:
        members: the images of each size, ``(n,)`` each.
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
        condition = {
            name: values if name == TEXT_LENGTHS else values.to(device, non_blocking=True)
            for name, values in self.condition.items()
        }
        loaded = tuple(None if values is None else values.to(device, non_blocking=True) for values in self.loaded)
        return HostBatch(self.step, self.ids, self.stored.to(device, non_blocking=True), condition, loaded)


class Batch(NamedTuple):
    """The inputs of one step, on the device that trains except for ``ids`` and the lengths of texts.

    Attributes:
        ids: numbers of the images, ``(B,)``.
        x: clean images or latents, ``(B, C, H, W)``.
        noise: ``(B, C, H, W)``.
        t: times from 0 (data) to 1 (noise), ``(B,)``.
        condition: see :class:`HostBatch`.
        loaded: see :class:`HostBatch`.
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
        return [self._rows(slice(start, start + size)) for start in range(0, len(self.ids), size)]

    def _rows(self, rows: slice) -> Batch:
        ids, x, noise, t = (values[rows] for values in (self.ids, self.x, self.noise, self.t))
        condition, draws = (
            {name: values[rows] for name, values in named.items()} for named in (self.condition, self.draws)
        )
        loaded = tuple(None if values is None else values[rows] for values in self.loaded)
        return Batch(ids, x, noise, t, condition, loaded, draws)


class _Drawn(NamedTuple):
    """Random numbers of a whole batch: times and dropped labels, ``(batch_size,)``, and the generator for its noise."""

    t: torch.Tensor
    dropped: torch.Tensor
    draw: torch.Generator


class Steps(Dataset[HostBatch]):
    """The batch of every step by its number, a function of (config, seed, step) and the kind of device alone.

    Args:
        config: batch size, label dropout and distribution of times.
        process: the noise process, which draws the times.
        conditioning: labels or captions of the images.
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
        process: Process,
        conditioning: Conditioning,
        part: tuple[int, int] = (0, 1),
        readers: Sequence[Reader | None] = (),
        weights: Sequence[Callable[[int], float]] = (),
        draws: Mapping[str, Draw] | None = None,
    ) -> None:
        self._train, self._seed, self._images = config.train, seed, images
        self._process, self._conditioning = process, conditioning
        self._readers, self._weights, self._draws = tuple(readers), tuple(weights), dict(draws or {})
        train = images.split.train
        self._order = BatchOrder([train[group] for group in groups(images.source.sizes[train])], seed)
        number, parts = part
        size = config.train.batch_size // parts
        self._part = slice(number * size, (number + 1) * size)

    def __len__(self) -> int:
        return self._train.steps

    def __getitem__(self, step: int) -> HostBatch:
        return self._read(step, self._draw(step, _CPU))

    def draw(self, host: HostBatch) -> Batch:
        """Draw the times and the noise of a batch on the device that the batch is on.

        Every process draws the numbers of the whole batch and takes its part, so that their number changes nothing.
        """
        return self._noised(host, self._draw(host.step, host.stored.device))

    def _read(self, step: int, drawn: _Drawn) -> HostBatch:
        size, part = self._train.batch_size, self._part
        ids = self._order.take(step, size)
        if self._images.flips:  # image i + base_count is image i mirrored
            is_mirrored = torch.rand(size, generator=generator(self._seed, "flips", step * size)) < 0.5
            ids = ids + self._images.base_count * is_mirrored
        ids, dropped = ids[part], drawn.dropped[part]
        is_read = any(weight(step) != 0 for weight in self._weights)
        loaded = tuple(read and read(ids) for read in self._readers) if is_read else ()
        return HostBatch(step, ids, self._images.space.read(ids), self._conditioning(ids, dropped), loaded)

    def _noised(self, host: HostBatch, drawn: _Drawn) -> Batch:
        size, space, part = self._train.batch_size, self._images.space, self._part
        t, _, draw = drawn
        encoding = space.draw(host.stored, size, draw)
        x = space.encode(host.stored, None if encoding is None else encoding[part])
        noise = torch.randn((size, *x.shape[1:]), generator=draw, device=draw.device)
        draws = {
            name: draw_for(size, generator(self._seed, name, host.step * size, device=draw.device))[part]
            for name, draw_for in self._draws.items()
        }
        return Batch(host.ids, x, noise[part], t[part], host.condition, host.loaded, draws)

    def load(self, steps: Iterable[int], device: torch.device, workers: int) -> Iterator[Batch]:
        """Yield the batches of some steps on a device.

        Args:
            steps: numbers of the steps.
            device: where times and noise are drawn and the step runs.
            workers: processes that read; 0 reads in this process.

        Raises:
            DataError: an image or a cache cannot be read, or a process that reads has ended.
        """
        is_gpu = device.type == "cuda"
        if workers == 0 and not is_gpu:  # a loader would take longer than reading small images does
            for step in steps:
                drawn = self._draw(step, _CPU)
                yield self._noised(self._read(step, drawn), drawn)
            return
        loader = DataLoader(_Errors(self), batch_size=None, sampler=steps, num_workers=workers, pin_memory=is_gpu)
        read = _raising(loader)
        for host in _copied_ahead(read, device) if is_gpu else read:
            yield self.draw(host)

    def _draw(self, step: int, device: torch.device) -> _Drawn:
        size = self._train.batch_size
        draw = generator(self._seed, "noise", step * size, device=device)
        t = self._process.times(self._train.times, size, draw)
        dropped = torch.rand(size, generator=draw, device=device) < self._train.label_dropout
        return _Drawn(t, dropped, draw)


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
    """Yield what a loader yields, and raise what is wrong with the data or with the loader's processes.

    Raises:
        DataError: see :meth:`Steps.load`.
    """
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
