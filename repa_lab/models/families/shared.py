"""What several families have in common: packing of latents, arguments, conditioning and texts. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from repa_lab.models.family import ATTENTION, TEXT_LENGTHS, Blocks, Condition, Tensor

# Names of a text and its mask in the conditioning.
MASKED_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
# Blocks that have a text stream beside the image stream and return both, text first, and their attention layers.
JOINT_BLOCKS = Blocks("transformer_blocks", item=1)
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def pack(latents: Tensor) -> Tensor:
    """Turn patches of 2x2 cells into tokens: ``(B, C, 2h, 2w)`` to ``(B, h*w, 4C)``, ordered (channel, row, column)."""
    cut = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
    packed: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return packed


def unpack(output: Any, latents: Tensor) -> Tensor:
    """Invert :func:`pack` for a prediction of the latents' shape."""
    batch, channels, height, width = latents.shape
    cut = output.reshape(batch, height // 2, width // 2, channels, 2, 2)
    latent: Tensor = cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
    return latent


def flatten(latents: Tensor) -> Tensor:
    """Turn every cell into a token: ``(B, C, h, w)`` to ``(B, h*w, C)``."""
    return latents.flatten(2).transpose(1, 2)


def unflatten(output: Any, latents: Tensor) -> Tensor:
    """Invert :func:`flatten` for a prediction of the latents' shape."""
    latent: Tensor = output.transpose(1, 2).reshape(latents.shape)
    return latent


def numbers(like: Tensor, count: int) -> Tensor:
    """Return the numbers from 0 on ``(count,)``, float32, made on a tensor's device: a copy to a GPU waits."""
    return like.new_ones(count).float().cumsum(0) - 1


def positions(latents: Tensor, axes: int = 3, patch: int = 2) -> Tensor:
    """Return rotary positions ``(h*w, axes)``: row and column on the second and third axis, 0 on the others.

    Args:
        latents: latents ``(B, C, H, W)``.
        patch: cells per token along each side.
    """
    height, width = (side // patch for side in latents.shape[-2:])
    ids = latents.new_zeros(height, width, axes)
    ids[..., 1] += numbers(latents, height).unsqueeze(1)
    ids[..., 2] += numbers(latents, width)
    return ids.flatten(0, 1)


def map_inputs(latents: str = "hidden_states", times: int = 1000) -> Callable[..., dict[str, Any]]:
    """Return :attr:`Network.inputs` of a model that takes latents ``(B, C, H, W)`` and conditioning by its own names.

    Args:
        latents: name of the argument for the latents.
        times: time of pure noise.
    """
    return lambda config, values, time, condition: {latents: values, "timestep": time * times, **condition}


def full_guidance(config: Any, time: Tensor) -> dict[str, Any]:
    """Return the guidance of training, 1, ``(B,)`` for a model that is distilled from guidance."""
    return {"guidance": time.new_ones(time.shape)} if config.guidance_embeds else {}


def shapes(**named: tuple[int | str, ...]) -> Callable[[Any, int], dict[str, tuple[int, ...]]]:
    """Return :attr:`Network.condition` from the shape of each entry.

    Args:
        **named: sizes: a number, ``"tokens"`` for the number of text tokens, or the name of a field of the config.
    """

    def condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        def size(value: int | str) -> int:
            return value if isinstance(value, int) else tokens if value == "tokens" else getattr(config, value)

        return {name: tuple(map(size, shape)) for name, shape in named.items()}

    return condition


def text_shapes(width: str, **others: tuple[int | str, ...]) -> Callable[[Any, int], dict[str, tuple[int, ...]]]:
    """Return :attr:`Network.condition` of a text, whose width is a field of the config, and of other entries."""
    return shapes(encoder_hidden_states=("tokens", width), **others)


def masked_text(width: str, **others: tuple[int | str, ...]) -> Callable[[Any, int], dict[str, tuple[int, ...]]]:
    """Return :attr:`Network.condition` of a text and its mask, and of other entries."""
    return text_shapes(width, encoder_attention_mask=("tokens",), **others)


def encode_prompt(
    *names: str | None, if_empty: Callable[[Any, list[int], dict[str, Tensor]], None] | None = None, **options: Any
) -> Callable[[Any, Sequence[str]], dict[str, Tensor]]:
    """Return :attr:`Pipeline.encode` for a pipeline whose ``encode_prompt`` does all the work.

    Args:
        *names: name of each value that ``encode_prompt`` returns; None for one that is not needed.
        if_empty: changes the encoded values at the given rows, those of empty captions.
        **options: further arguments of ``encode_prompt``.
    """

    def encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        values = zip(names, pipeline.encode_prompt(list(captions), **options), strict=False)
        encoded = {name: value.long() if "mask" in name else value for name, value in values if name}
        if if_empty is not None:
            if_empty(pipeline, [number for number, caption in enumerate(captions) if not caption], encoded)
        return encoded

    return encode


def rename(**names: str) -> Callable[[Condition], dict[str, Any]]:
    """Return :attr:`Pipeline.prompt` from the name of the conditioning by argument."""
    return lambda condition: {argument: condition[name] for argument, name in names.items()}


def text_lengths(condition: Condition) -> Tensor:
    """Return the number of tokens of each text ``(B,)``, from its mask if need be; padding is on the right."""
    known = condition.get(TEXT_LENGTHS)
    return condition["encoder_attention_mask"].sum(dim=1) if known is None else known


def longest(text: Tensor, mask: Tensor) -> Tensor:
    """Cut texts ``(B, M, ...)`` after the longest of them, by their mask ``(B, M)``."""
    return text[:, : int(mask.sum(dim=1).max())]


def longest_text(condition: Condition) -> Tensor:
    """Return the texts of a conditioning, cut after the longest of them."""
    return condition["encoder_hidden_states"][:, : int(text_lengths(condition).max())]


def padded(values: Tensor, length: int) -> Tensor:
    """Pad sequences ``(B, M, ...)`` with zeros to ``length`` tokens."""
    whole = values.new_zeros(values.shape[0], length, *values.shape[2:])
    whole[:, : values.shape[1]] = values
    return whole


def padded_texts(texts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Return texts ``(M, D)``, each cut or padded with zeros to ``length`` tokens, and their masks as conditioning."""
    from torch.nn.utils.rnn import pad_sequence

    cut = [text[:length] for text in texts]
    text, mask = (pad_sequence(rows, batch_first=True) for rows in (cut, [row.new_ones(len(row)) for row in cut]))
    return {"encoder_hidden_states": padded(text, length), "encoder_attention_mask": padded(mask.long(), length)}


def texts_alone(condition: Condition) -> dict[str, Any]:
    """Return the texts of :func:`padded_texts` without their padding, as the argument ``prompt_embeds``."""
    lengths = text_lengths(condition).tolist()
    texts = zip(condition["encoder_hidden_states"], lengths, strict=True)
    return {"prompt_embeds": [text[:length] for text, length in texts]}


def zero_rows(pipeline: Any, rows: list[int], encoded: dict[str, Tensor]) -> None:
    """Set rows to zero if the pipeline does so for empty captions."""
    if pipeline.config.force_zeros_for_empty_prompt:
        for values in encoded.values():
            values[rows] = 0


def negative_rows(pipeline: Any, rows: list[int], encoded: dict[str, Tensor]) -> None:
    """Replace rows by the pipeline's own negative text and mask, which have no instructions."""
    if rows:
        text, mask = encoded["encoder_hidden_states"], encoded["encoder_attention_mask"]
        _, _, text[rows], mask[rows] = pipeline.encode_prompt([""])
