"""Components of tiny pipelines whose texts are read by language models; see :mod:`repa_lab.models.families.parts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.families.parts import VOCABULARY
from repa_lab.models.families.shared import text_lengths
from repa_lab.models.pipeline import Part

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
_ENDS = dict.fromkeys(
    ("bos_token_id", "eos_token_id", "pad_token_id")
)  # the released ones are not in the tiny vocabulary
# The parts for images, which no caption reaches.
_VISION = {"hidden_size": 8, "intermediate_size": 8}
_QWEN_VISION = {**_VISION, "depth": 1, "num_heads": 2, "fullatt_block_indexes": [0]}
_PIXTRAL_VISION = {**_VISION, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2}

GEMMA_TOKENIZER = Part("transformers.GemmaTokenizer", {"add_bos_token": True})
LLAMA_TOKENIZER = Part("transformers.PreTrainedTokenizerFast", {"pad_token": "<|end_of_text|>"})
LEFT_TOKENIZER = Part("transformers.PreTrainedTokenizerFast", {"pad_token": "<|end_of_text|>", "padding_side": "left"})
PIXTRAL_PROCESSOR = Part(
    "transformers.PixtralProcessor",
    {
        "image_processor": Part("transformers.PixtralImageProcessor"),
        "tokenizer": LEFT_TOKENIZER,
        "chat_template": "{% for message in messages %}[{{ message.role }}]{{ message.content[0].text }}{% endfor %}",
    },
)
QWEN_TOKENIZER = Part("transformers.Qwen2Tokenizer")
QWEN_PROCESSOR = Part(
    "transformers.Qwen2VLProcessor",
    {
        "image_processor": Part("transformers.Qwen2VLImageProcessor"),
        "video_processor": Part("transformers.Qwen2VLVideoProcessor"),
        "tokenizer": QWEN_TOKENIZER,
    },
)


def language_model(name: str, width: int, **config: Any) -> Part:
    """A language model of transformers' class ``name``, which reads text alone."""
    return Part(f"transformers.{name}", _text(width, **config))


def qwen_vl(width: int) -> Part:
    """Qwen2.5-VL, which reads text and images."""
    rotary = {
        "rope_type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 1e6,
    }  # half a head, by time, row and column
    vision = {**_QWEN_VISION, "out_hidden_size": width}
    text = _text(width, num_attention_heads=width // 4, rope_parameters=rotary)
    return Part("transformers.Qwen2_5_VLForConditionalGeneration", {"text_config": text, "vision_config": vision})


def qwen3_vl(width: int, layers: int) -> Part:
    """Qwen3-VL without its language head."""
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 5e6}
    vision = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": width, "deepstack_visual_indexes": [0]}
    text = _text(width, num_hidden_layers=layers, rope_parameters=rotary)
    return Part("transformers.Qwen3VLModel", {"text_config": text, "vision_config": vision})


def mistral_vl(name: str, width: int, **config: Any) -> Part:
    """Mistral Small 3 or a relative of transformers' class ``name``, which reads text and images."""
    text = {"model_type": "mistral", **_text(width, **config)}
    return Part(f"transformers.{name}", {"text_config": text, "vision_config": _PIXTRAL_VISION})


def negative_where_empty(
    pipeline: Any, captions: Sequence[str], text: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Texts ``(B, M, D)`` and masks ``(B, M)``, with the pipeline's own negative where a caption is empty.

    It is read without the instructions that a caption is read with.
    """
    empty = [number for number, caption in enumerate(captions) if not caption]
    if empty:
        _, _, text[empty], mask[empty] = pipeline.encode_prompt([""])
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def longest(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Texts ``(B, M, ...)``, cut after the longest of them by their mask ``(B, M)``: as long as a pipeline would pad them."""
    return text[:, : int(mask.sum(dim=1).max())]


def padded_texts(texts: Sequence[torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Return texts ``(M, D)``, each cut or padded with zeros to ``length`` tokens, and their masks as conditioning."""
    from torch.nn.utils.rnn import pad_sequence

    cut = [text[:length] for text in texts]
    text, mask = (pad_sequence(rows, batch_first=True) for rows in (cut, [row.new_ones(len(row)) for row in cut]))
    return {"encoder_hidden_states": padded(text, length), "encoder_attention_mask": padded(mask.long(), length)}


def texts_alone(condition: Condition) -> list[torch.Tensor]:
    """Return the texts of :func:`padded_texts` without their padding."""
    lengths = text_lengths(condition).tolist()
    return [text[:length] for text, length in zip(condition["encoder_hidden_states"], lengths, strict=True)]


def padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Sequences ``(B, M, ...)`` with zeros after them, ``length`` long."""
    whole = values.new_zeros(values.shape[0], length, *values.shape[2:])
    whole[:, : values.shape[1]] = values
    return whole


def _text(width: int, **config: Any) -> dict[str, Any]:
    return {**_SMALL, **_ENDS, "hidden_size": width, "intermediate_size": width, "head_dim": 4, **config}
