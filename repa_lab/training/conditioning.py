"""What a denoiser is told beside the noisy image and the time: a class, or a caption's encoding and the image's sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from repa_lab.data.cache import TextCache
from repa_lab.data.sources import ImageSource

Condition = dict[str, torch.Tensor]
Sizes = Callable[[Any, torch.Tensor], dict[str, torch.Tensor]]  # see :attr:`repa_lab.models.family.Pipeline.sizes`


class Conditioning(Protocol):
    """Conditioning of images of the source, by the names that the denoiser takes it under, one row an image.

    Attributes:
        kinds: how many classes or captions samples are drawn of.
    """

    kinds: int

    def __call__(self, index: torch.Tensor, dropped: torch.Tensor) -> Condition:
        """Of the images ``index`` ``(B,)``; where ``dropped`` ``(B,)``, bool, is set, of nothing."""
        ...

    def of_samples(self, kinds: Sequence[int], dropped: bool = False) -> Condition:
        """Of samples of these classes or captions, by their numbers; if ``dropped``, of nothing."""
        ...


class Labels:
    """Classes; the number after the last stands for none.

    Args:
        labels: of every image, ``(n,)``.
        null: the label that stands for none.
        classes: how many classes samples are drawn of.
        name: what the denoiser calls it.
    """

    def __init__(self, labels: torch.Tensor, null: int, classes: int, name: str = "y") -> None:
        self._labels, self._null, self.kinds, self._name = labels, null, classes, name

    def __call__(self, index: torch.Tensor, dropped: torch.Tensor) -> Condition:
        """See :class:`Conditioning`."""
        return {self._name: self._labels[index].masked_fill(dropped, self._null)}

    def of_samples(self, kinds: Sequence[int], dropped: bool = False) -> Condition:
        """See :class:`Conditioning`."""
        return {self._name: torch.tensor([self._null if dropped else kind for kind in kinds])}


class Captions:
    """Captions as the family's text encoders see them; nothing is the empty caption.

    Args:
        source: the images, with captions.
        train: those whose captions samples are drawn for.
        texts: their encodings.
        sizes: what a family is told of an image's sizes, or None.
        config: of the denoiser's model.
    """

    def __init__(
        self, source: ImageSource, train: torch.Tensor, texts: TextCache, sizes: Sizes | None, config: Any
    ) -> None:
        self._source, self._train, self._texts, self._sizes, self._config = source, train, texts, sizes, config
        self.kinds = len(train)

    def __call__(self, index: torch.Tensor, dropped: torch.Tensor) -> Condition:
        """See :class:`Conditioning`."""
        captions = [
            "" if drop else self._source.captions[i] for i, drop in zip(index.tolist(), dropped.tolist(), strict=True)
        ]
        sized = self._sizes(self._config, self._source.frames(index.tolist()).float()) if self._sizes else {}
        return {**self.of_texts(captions), **sized}

    def of_samples(self, kinds: Sequence[int], dropped: bool = False) -> Condition:
        """See :class:`Conditioning`; of the text alone, for a pipeline knows the sizes it draws."""
        images = self._train[torch.tensor(kinds)].tolist()
        return self.of_texts(["" if dropped else self._source.captions[image] for image in images])

    def of_texts(self, texts: Sequence[str]) -> Condition:
        """Of texts that were encoded ahead of time, float32 but for masks."""
        encoded = self._texts.read(texts)
        return {name: values.float() if values.is_floating_point() else values for name, values in encoded.items()}
