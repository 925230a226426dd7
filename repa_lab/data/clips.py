"""Clips: short runs of frames, from folders of images or from animated files, as one item of a source each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repa_lab.data.crop import crop, opaque
from repa_lab.data.listing import Clip, fingerprint_clips, read_clips
from repa_lab.data.settings import ClipsSettings
from repa_lab.data.sources import CroppedImages, DerivedSource, ImageSource, open_upright, remembered, stamps


def open_clips(settings: ClipsSettings, cache: Path | None = None) -> Clips:
    """Open a folder of clips."""
    return Clips(settings, cache)


class Clips(CroppedImages):
    """Clips of equally many frames below a folder; see :func:`repa_lab.data.listing.read_clips` for what is read.

    Args:
        settings: the folder, the frames, and the size.
        cache: folder of all caches; files that it knows are not opened before their pixels are needed.

    Raises:
        DataError: there is no folder, no clip in it, a clip is too short, or metadata cannot be used.
    """

    num_classes = 1

    def __init__(self, settings: ClipsSettings, cache: Path | None = None) -> None:
        clips = read_clips(settings.folder, settings.needed_frames, settings.caption_column)
        super().__init__(len(clips.clips), settings.side)
        self._clips, self.clip_frames, self._step = clips.clips, settings.frames, settings.frame_step
        unchanged = stamps(file for clip in clips.clips for file in clip.files)
        if buckets := settings.sizes:
            self.choose_sizes(buckets, cache, unchanged)
        self.labels = torch.zeros(len(self), dtype=torch.long)
        self.captions, self.notes = clips.captions, clips.notes
        fingerprint = partial(
            fingerprint_clips, clips, settings.side, settings.sizes, settings.frames, settings.frame_step
        )
        key = {"kind": "clips/1", "of": unchanged, "listing": fingerprint()}
        self.fingerprint = remembered(cache, key, lambda: fingerprint(content=True))

    def open(self, index: int) -> Image.Image:
        """Return the first frame of a clip; see :class:`CroppedImages`."""
        (first,) = _read_frames(self._clips[index], [0])
        return first

    def name(self, index: int) -> str:
        """Return a clip's folder or file; see :class:`CroppedImages`."""
        return f"the clip '{self._clips[index].path}'"

    def _pixels(self, index: int) -> torch.Tensor:
        """Return the frames of a clip, ``(3, frames, H, W)``."""
        chosen, size = range(0, self.clip_frames * self._step, self._step), self._size(index)
        with self._opened(index):  # notes the size of the original
            frames = [np.array(crop(opaque(frame), size)) for frame in _read_frames(self._clips[index], chosen)]
        return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


def _read_frames(clip: Clip, chosen: Sequence[int]) -> list[Image.Image]:
    """Return frames of a clip by number: of its images, or of the one animated file or array that it is."""
    if clip.path.is_dir():
        return [open_upright(clip.files[number]) for number in chosen]
    if clip.path.suffix == ".npy":
        array = np.load(clip.path, mmap_mode="r")
        return [Image.fromarray(array[number]) for number in chosen]
    frames = []
    with Image.open(clip.path) as animation:
        for number in chosen:
            animation.seek(number)
            frames.append(animation.copy())
    return frames


def as_images(pixels: torch.Tensor) -> torch.Tensor:
    """Return every frame of clips ``(B, C, F, H, W)`` as an image ``(B * F, C, H, W)``, and images as they are."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)


class LatentFrames(DerivedSource):
    """The frames of clips that stand for the denoiser's: of a clip, every ``stride``-th frame from the first on.

    A causal autoencoder makes a latent frame of the first frame alone, and one of every ``stride`` frames after it.
    Latent frame k is of the frames up to frame ``k * stride``, which is the last of them.

    Args:
        source: the clips.
        stride: frames of a clip per latent frame.
    """

    def __init__(self, source: ImageSource, stride: int) -> None:
        super().__init__(source, "latent frames", stride=stride)
        self.clip_frames, self._stride = -(-source.clip_frames // stride), stride

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return pixels ``(n, C, latent frames, H, W)``; see :class:`repa_lab.data.sources.ImageSource`."""
        return self.base.read(index)[:, :, :: self._stride]
