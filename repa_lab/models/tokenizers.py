"""Tiny tokenizers of the released ones' classes, which know the printable characters one by one."""

from __future__ import annotations

import atexit
import functools
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa_lab.models.families.parts import VOCABULARY


def _bytes() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _numbered(tokens: list[str]) -> dict[str, int]:
    assert len(set(tokens)) == len(tokens) <= VOCABULARY
    return {token: number for number, token in enumerate(tokens)}


def _clip() -> dict[str, Any]:
    single = _bytes()
    tokens = [*single, *(f"{token}</w>" for token in single), "<|startoftext|>", "<|endoftext|>"]
    return {"vocab": _numbered(tokens), "merges": []}


def _t5() -> dict[str, Any]:
    letters = [("▁", -2.0), *((character, -3.0) for character in string.printable.strip())]
    return {
        "vocab": [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters],
        "extra_ids": 0,
        "additional_special_tokens": [],
    }


def _bert() -> dict[str, Any]:
    single = string.printable.strip()
    return {
        "vocab": _numbered(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *single, *(f"##{letter}" for letter in single)]
        )
    }


def _llama() -> dict[str, Any]:
    return {"vocab": _numbered(["<unk>", "<s>", "</s>", "<pad>", "▁", *string.printable.strip()]), "merges": []}


@functools.cache
def _chatglm() -> dict[str, Any]:
    """A file, which its tokenizer reads when it is made and again when it is saved."""
    import sentencepiece

    letters = string.printable.strip()
    with tempfile.NamedTemporaryFile(suffix=".model", delete=False) as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([letters]),
            model_writer=file,
            model_type="char",
            vocab_size=len(letters) + 4,
            minloglevel=2,
        )
    atexit.register(Path(file.name).unlink)
    return {"vocab_file": file.name}


def _fast() -> dict[str, Any]:
    """A tokenizer's object, of bytes and of some words that are one token, as in the released vocabularies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    first, last = "<|begin_of_text|>", "<|end_of_text|>"
    beginnings = list(dict.fromkeys(f"Ġ{word[:end]}" for word in _WORDS for end in range(1, len(word) + 1)))
    vocabulary = _numbered([first, last, *_bytes(), *beginnings])
    tokenizer = Tokenizer(models.BPE(vocabulary, [(one[:-1], one[-1]) for one in beginnings]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (first, last)])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
    )
    return {"tokenizer_object": tokenizer, "bos_token": first, "eos_token": last}


_WORDS = ("a", "of", "on", "cat", "dog", "caption", "grass", "longer")


def _gemma() -> dict[str, Any]:
    return {"vocab": _numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable]), "merges": []}


def _qwen() -> dict[str, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokens = {"vocab": _numbered([*_bytes(), *special]), "merges": [], "additional_special_tokens": special[1:]}
    return {**tokens, "chat_template": _QWEN_CHAT}


# As much of Qwen3's as a caption meets: what it has said and thought, or none of it where thinking is off.
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


# The arguments of a tokenizer's constructor, by class.
TOKENIZERS: dict[str, Callable[[], dict[str, Any]]] = {
    "BertTokenizer": _bert,
    "ChatGLMTokenizer": _chatglm,
    "CLIPTokenizer": _clip,
    "GemmaTokenizer": _gemma,
    "LlamaTokenizer": _llama,
    "PreTrainedTokenizerFast": _fast,
    "Qwen2Tokenizer": _qwen,
    "T5Tokenizer": _t5,
}
