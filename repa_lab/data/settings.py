"""The registry of image sources, their settings, and what is known of a data set before images are read. No torch."""

from __future__ import annotations

import pkgutil
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator
from typing_extensions import override

from repa_lab.data.crop import Buckets
from repa_lab.data.folders import IMAGES, FileList, fingerprint_saved, read_clips, read_image_folder, read_listing
from repa_lab.data.huggingface import count_rows, load_saved, read_saved, resolve_commit
from repa_lab.files import digest
from repa_lab.registry import Registry
from repa_lab.settings import HubOrLocal, Positive, Settings

if TYPE_CHECKING:
    from repa_lab.data.sources import Source

_HELD_OUT = 256
_DIGITS = 1797
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set without reading its images.

    Attributes:
        fingerprint: the data set in the identity of runs.
        images: number of images; None if it is not known, or no folder is given.
        classes: number of classes.
        has_captions: whether there are captions.
        notes: what was left out, a sentence each.
    """

    fingerprint: str
    images: int | None
    classes: int = 1
    has_captions: bool = False
    notes: tuple[str, ...] = ()


class BucketsConfig(Settings):
    """Image sizes of several aspects, each of about the area of a square of the resolution."""

    step: Positive = 64
    """Height and width are multiples of this many pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """The longer side is at most this many times the shorter."""


class SourceSettings(Settings):
    """The settings that every source of images has."""

    source: str
    """The source's registered name."""
    resolution: Positive | None = None
    """Pixels along each side; null is 256, or 8 for digits."""
    vae: HubOrLocal | None = None
    """Train in this VAE's latent space: a hub id or a folder. Null is pixels, or a pretrained pipeline's own."""
    holdout: Positive | None = None
    """Images that are never trained on; null is 256 or, if that is less, a tenth of the images, one at least."""
    flip: bool = False
    """Mirror every other image at random as it is seen."""
    buckets: BucketsConfig | None = None
    """Keep about the aspect; null cuts squares at the centre."""

    usual_side: ClassVar[int] = 256
    """The resolution if none is given."""
    channels: ClassVar[int] = 3
    """Channels of the pixels."""
    is_prepared: ClassVar[bool] = False
    """Whether the source has latents of its own."""
    has_clips: ClassVar[bool] = False
    """Whether the source has clips, not images."""
    has_one_size: ClassVar[bool] = False
    """Whether the resolution cannot be chosen."""
    may_have_captions: ClassVar[bool] = True
    """Whether images of the source can have captions."""
    caption_advice: ClassVar[str | None] = None
    """How to add captions to a data set that has none; None if only a run finds out whether there are any."""
    usual_classes: ClassVar[int] = 1000
    """Classes that costs are counted for."""

    @property
    def clip_frames(self) -> int:
        """Frames of a clip; 0 for a source of images."""
        return 0

    @property
    def side(self) -> int:
        """Pixels along each side of a training image."""
        return self.resolution or self.usual_side

    @property
    def sizes(self) -> Buckets | None:
        """The sizes that images are brought to, or None if all are square."""
        return Buckets(self.side, self.buckets.step, self.buckets.max_aspect) if self.buckets else None

    @property
    def is_unset(self) -> bool:
        """Whether the settings do not say yet where the images are."""
        return False

    def held_out(self, images: int | None) -> int:
        """Return the number of images that are held out of ``images``, or of an unknown number if None."""
        if self.holdout is not None:
            return self.holdout
        return _HELD_OUT if images is None else max(1, min(_HELD_OUT, images // 10))

    def pinned(self) -> Self:
        """Return the settings with a name that may move, such as a branch, replaced by what it names now.

        Raises:
            DataError: what it names cannot be looked up.
        """
        return self

    def describe(self) -> Dataset:
        """Return what is known of the data set.

        Raises:
            DataError: the data set is not there, or incomplete.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Component:
    """A registered source: the class of its settings, and the functions that open and describe a data set by them.

    A data set is opened by its settings and the folder of all caches, or None.
    """

    settings: type[SourceSettings]
    open: Callable[[Any, Path | None], Source]
    describe: Callable[[Any], Dataset]


SOURCES: Registry[Component] = Registry("source of images")


def source(name: str, implementation: str | None = None) -> Callable[[C], C]:
    """Register a source of images under the name that ``data.source`` has.

    Decorates a :class:`Source` with its ``Settings`` inside, or settings alone, which ``implementation`` opens,
    ``package.module:name``.

    Raises:
        PluginError: the name is taken.
        TypeError: the class lacks what a source has.
    """

    def register(decorated: C) -> C:
        cls: Any = decorated
        if implementation is not None:

            def open_source(settings: Any, cache: Path | None) -> Source:
                opened: Source = pkgutil.resolve_name(implementation)(settings, cache)
                return opened

            component = Component(cls, open_source, cls.describe)
        elif not hasattr(cls, "describe"):
            raise TypeError(f"the source '{name}' must be a subclass of repa_lab.plugins.Source")
        elif lacking := sorted(getattr(cls, "__abstractmethods__", ())):
            raise TypeError(f"the source '{name}' lacks the method {lacking[0]}")
        else:
            component = Component(cls.Settings, lambda settings, cache: cls(settings), cls.describe)
        SOURCES.add(name, component)
        return decorated

    return register


@source("digits", "repa_lab.data.sources:Digits")
class DigitsSettings(SourceSettings):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels, ten classes."""

    source: Literal["digits"] = "digits"

    usual_side: ClassVar[int] = 8
    channels: ClassVar[int] = 1
    has_one_size: ClassVar[bool] = True
    may_have_captions: ClassVar[bool] = False
    usual_classes: ClassVar[int] = 10

    @model_validator(mode="after")
    def _are_8x8(self) -> Self:
        if self.side != self.usual_side:
            raise ValueError("digits are 8 pixels wide and high: resolution must be 8 or left out")
        return self

    def held_out(self, images: int | None) -> int:
        """Return the number of images that are held out: 256 by default, on which the quick start's numbers rest."""
        return self.holdout or _HELD_OUT

    @override
    def describe(self) -> Dataset:
        fingerprint = digest({"source": "digits", "images": _DIGITS})  # they ship with scikit-learn and never change
        return Dataset(fingerprint, _DIGITS, self.usual_classes)


class FolderSettings(SourceSettings):
    """A source that lies in a folder."""

    path: str | None = None
    """The folder; null has to be set before anything is trained."""

    def copy_few(self, target: Path, count: int) -> None:
        """Copy about ``count`` of the images or clips, with their captions, into a new folder; latents are left out."""
        raise NotImplementedError

    @property
    def is_unset(self) -> bool:
        """Whether no folder is named."""
        return self.path is None

    @property
    def folder(self) -> Path:
        """The folder."""
        return Path(self.path or "")


class CaptionedSettings(SourceSettings):
    """A source that may have columns of captions."""

    caption_column: str | None = None
    """The column of captions; null is `text`, `caption` or `prompt`, the first there is."""


class FilesSettings(CaptionedSettings, FolderSettings):
    """A folder of images or clips as files."""

    def list_files(self) -> FileList:
        """List the images; see :func:`read_image_folder`."""
        return read_image_folder(self.folder, self.caption_column)

    @property
    def read_as(self) -> dict[str, Any]:
        """How the files are read, for fingerprints."""
        buckets = {"buckets": asdict(self.sizes)} if self.sizes else {}
        return {"source": self.source, "resolution": self.side, **buckets}

    @override
    def copy_few(self, target: Path, count: int) -> None:
        self.list_files().copy_few(target, count, self.caption_column)

    @override
    def describe(self) -> Dataset:
        files = self.list_files()
        fingerprint, classes = files.fingerprint(self.read_as), len(set(files.classes))
        return Dataset(fingerprint, len(files.items), classes, bool(files.captions), files.notes)


@source("imagefolder", "repa_lab.data.sources:ImageFolder")
class ImageFolderSettings(FilesSettings):
    """A folder of images, by the rules of Hugging Face's image folders."""

    source: Literal["imagefolder"] = "imagefolder"

    caption_advice: ClassVar[str | None] = "give metadata.jsonl (file_name, text), or a .txt beside each image"


@source("clips", "repa_lab.data.sources:Clips")
class ClipsSettings(FilesSettings):
    """A folder of short clips: subfolders of frames, or animated files (`.gif`, `.webp`, `.npy`)."""

    source: Literal["clips"] = "clips"
    frames: Positive = 17
    """Frames of each clip, from its first on: 1 and a multiple of 4 for Wan, of 8 for LTX-Video."""
    frame_step: Positive = 1
    """Take every frame, every second, and so on."""

    has_clips: ClassVar[bool] = True
    caption_advice: ClassVar[str | None] = "give metadata.jsonl (file_name, text), or a .txt beside each clip"

    @property
    def clip_frames(self) -> int:
        """Frames of a clip."""
        return self.frames

    @property
    def needed_frames(self) -> int:
        """Frames that a clip must have."""
        return (self.frames - 1) * self.frame_step + 1

    @override
    def list_files(self) -> FileList:
        return read_clips(self.folder, self.needed_frames, self.caption_column)

    @property
    def read_as(self) -> dict[str, Any]:
        """How the files are read, for fingerprints."""
        return {**super().read_as, "frames": self.frames, "step": self.frame_step}


@source("datasets", "repa_lab.data.sources:open_saved")
class SavedSettings(CaptionedSettings, FolderSettings):
    """A folder that `Dataset.save_to_disk` of `datasets` wrote."""

    source: Literal["datasets"] = "datasets"

    caption_advice: ClassVar[str | None] = "give a column of captions (data.caption_column)"

    @override
    def copy_few(self, target: Path, count: int) -> None:
        rows = load_saved(self.folder)
        rows.select(range(0, len(rows), max(1, len(rows) // count))).save_to_disk(str(target))

    @override
    def describe(self) -> Dataset:
        fingerprint = fingerprint_saved(self.folder, self.side, self.sizes)
        rows, columns = read_saved(self.folder, self.caption_column)
        return Dataset(fingerprint, rows, columns.classes, columns.captions is not None, columns.notes)


@source("hub", "repa_lab.data.sources:open_hub")
class HubSettings(CaptionedSettings):
    """A data set of the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    name: str
    """The id of the data set, `owner/name`."""
    config: str | None = None
    """Its configuration (subset); null is the default one."""
    split: str = "train"
    """The split, or a slice such as `train[:5000]`."""
    revision: str | None = None
    """A branch, a tag or a commit; null is the main branch. A run records the commit."""

    @property
    def commit(self) -> str:
        """The commit that the revision names; see :func:`resolve_commit`."""
        return resolve_commit(self.name, self.revision)

    @property
    def fingerprint(self) -> str:
        """A digest of what is read and of the resolution; a commit stands for its content."""
        table = {"name": self.name, "config": self.config, "split": self.split, "commit": self.commit}
        buckets = asdict(self.sizes) if self.sizes else None
        return digest({"source": "hub", **table, "resolution": self.side, "buckets": buckets})

    def pinned(self) -> Self:
        """Return the settings with the commit in place of a branch or a tag."""
        return self.model_copy(update={"revision": self.commit})

    def describe(self) -> Dataset:
        """Return the number of images that the hub's card gives; whether there are captions is found by the run."""
        count = count_rows(self.name, self.config, self.split, self.commit)
        return Dataset(self.fingerprint, count, has_captions=True)


@source("repa", "repa_lab.data.prepared:Prepared")
class PreparedSettings(FolderSettings):
    """A folder that REPA's preprocessing or `repa-lab data prepare` wrote, whose latents are taken as they are."""

    source: Literal["repa"] = "repa"

    is_prepared: ClassVar[bool] = True
    may_have_captions: ClassVar[bool] = False

    @override
    def copy_few(self, target: Path, count: int) -> None:
        listing = read_listing(self.folder)
        for index in listing.sample(count):
            folder = target / f"{listing.labels[index]:04d}"
            folder.mkdir(exist_ok=True)
            shutil.copy(listing.path(IMAGES, index), folder)

    @model_validator(mode="after")
    def _is_fixed(self) -> Self:
        if self.flip or self.buckets:
            raise ValueError("prepared latents are of square images, none of them mirrored: leave flip and buckets out")
        return self

    @override
    def describe(self) -> Dataset:
        listing = read_listing(self.folder)
        return Dataset(listing.fingerprint(self.side), len(listing), max(listing.labels) + 1)
