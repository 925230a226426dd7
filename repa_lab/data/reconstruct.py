"""Images as an autoencoder gives them back: what an encoder looks at when its pixels come from the latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from repa_lab.data.autoencoder import Autoencoder, to_uint8
from repa_lab.data.errors import DataError
from repa_lab.data.sources import ImageSource
from repa_lab.data.space import LatentSpace
from repa_lab.files import digest

_BATCH = 8  # decoding at full resolution takes far more memory than the pixels


class Reconstructions:
    """A source whose pixels are decoded from the latents of another.

    Decoded is the mean of the posterior, so that an image's pixels are a function of the image. They are the same
    whether they are read in training or once for the cache, but for a grey level where the batch decides how a
    convolution rounds.

    Args:
        source: the images.
        space: their latents.
        decoder: decodes what the diffusion model sees: the space's own VAE, or a tiny autoencoder of the same latents.
        device: where to decode; pixels are given back on the CPU.

    Raises:
        DataError: the decoder is one of other latents.
    """

    def __init__(self, source: ImageSource, space: LatentSpace, decoder: Autoencoder, device: torch.device) -> None:
        if decoder is not space.vae and decoder.latent_channels != space.channels:
            seen = f"'{decoder.field}' decodes latents of {decoder.latent_channels} channels"
            raise DataError(decoder.field, f"{seen}, but those of the VAE have {space.channels}: it is for another VAE")
        self._space, self._decoder, self._device = space, decoder, device
        self._source = source
        self.channels, self.side, self.num_classes = source.channels, source.side, source.num_classes
        self.labels, self.sizes, self.captions = source.labels, source.sizes, source.captions
        self.notes = source.notes
        content = {"of": source.fingerprint, "vae": space.vae.identity, "decoder": decoder.identity}
        self.fingerprint = digest({"source": f"reconstructions/{decoder.field}", **content})

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`.

        Raises:
            DataError: what is decoded has another size than the images.
        """
        return torch.cat([self._decode(part) for part in torch.as_tensor(index).split(_BATCH)])

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return self._source.frames(index)

    def _decode(self, index: torch.Tensor) -> torch.Tensor:
        x = self._space.encode(index, None)
        pixels = to_uint8(self._decoder.decode(x.to(self._device))).cpu()
        seen, wanted = tuple(pixels.shape[1:]), (self.channels, *self._source.sizes[index[0]].tolist())
        if seen != wanted:
            raise DataError(
                self._decoder.field, f"images of {wanted} are given back as {seen}: it is not for these latents"
            )
        return pixels
