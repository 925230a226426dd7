"""Tiny random pipelines of diffusers with the classes of the released ones, for tests and rehearsals."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import inspect
import string
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repa_lab.models.families.components import VOCABULARY
from repa_lab.models.family import Component, Family, network_of, pipeline_of
from repa_lab.models.pretrained import build_net

_LETTERS = tuple(string.printable.strip())


def write_tiny_pipeline(family: Family, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a random pipeline of the family's own classes, laid out as a released one.

    Args:
        config: arguments of the denoiser that replace those of :attr:`Network.tiny`.
    """
    import diffusers

    pipeline, network = pipeline_of(family), network_of(family)
    pipeline_class = getattr(diffusers, pipeline.classes[0])
    absent = dict.fromkeys(pipeline_class._optional_components)
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(0)
        components = {name: build_component(component) for name, component in pipeline.tiny.items()}
        net = build_net(family, {**network.tiny, **(config or {})})
        for parameter in net.parameters():
            if not parameter.any():  # as after training: nothing before a closed gate would learn
                nn.init.normal_(parameter, std=0.02)
        pipeline_class(**{**absent, **components, pipeline.denoiser: net}).save_pretrained(folder)


def full_depth(family: Family) -> dict[str, Any]:
    """Return the arguments that give the tiny denoiser as many blocks as the released one has."""
    import diffusers

    network = network_of(family)
    defaults = inspect.signature(getattr(diffusers, network.model)).parameters
    depths = {name: network.config.get(name, defaults[name].default) for name in network.depths}
    entries = {name: network.tiny[name] for name in network.per_block}
    count = sum(depths.values())
    return {**depths, **{name: (*values, *[values[-1]] * (count - len(values))) for name, values in entries.items()}}


def build_component(component: Component) -> Any:
    """Build a component with random weights."""
    library, name = component.name.rsplit(".", 1)
    component_class = getattr(importlib.import_module(library), name)
    arguments = component.config.items()
    config = {key: build_component(value) if isinstance(value, Component) else value for key, value in arguments}
    if name in _TOKENIZERS:
        return component_class(**_TOKENIZERS[name](), **config)
    if hasattr(component_class, "config_class"):  # of transformers
        model = component_class(component_class.config_class(**config))
        for parameter in model.parameters():  # all of them, because ChatGLM's constructor leaves memory uninitialised
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
        return model.eval()
    with contextlib.suppress(AttributeError):
        return component_class.from_config(config)
    return component_class(**config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, and warnings of untrained models and of a missing safety checker."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for library, verbosity in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()


# What follows are tokenizers of the released classes, in whose vocabularies every printable character is one token.


def _bytes() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _numbered(*tokens: str) -> dict[str, int]:
    assert len(set(tokens)) == len(tokens) <= VOCABULARY
    return {token: number for number, token in enumerate(tokens)}


def _clip() -> dict[str, Any]:
    ends = [f"{character}</w>" for character in _bytes()]
    return {"vocab": _numbered(*_bytes(), *ends, "<|startoftext|>", "<|endoftext|>"), "merges": []}


def _t5() -> dict[str, Any]:
    letters = [("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return {"vocab": vocabulary, "extra_ids": 0, "additional_special_tokens": []}


def _bert() -> dict[str, Any]:
    inner = [f"##{letter}" for letter in _LETTERS]
    return {"vocab": _numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *inner)}


def _llama() -> dict[str, Any]:
    return {"vocab": _numbered("<unk>", "<s>", "</s>", "<pad>", "▁", *_LETTERS), "merges": []}


def _gemma() -> dict[str, Any]:
    return {"vocab": _numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable), "merges": []}


@functools.cache
def _chatglm() -> dict[str, Any]:
    """Return a vocabulary file, which the tokenizer reads when it is made and again when it is saved."""
    import sentencepiece

    with tempfile.NamedTemporaryFile(suffix=".model", delete=False) as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["".join(_LETTERS)]),
            model_writer=file,
            model_type="char",
            vocab_size=len(_LETTERS) + 4,
            minloglevel=2,
        )
    atexit.register(Path(file.name).unlink)
    return {"vocab_file": file.name}


def _fast() -> dict[str, Any]:
    """Return a tokenizer object for bytes and a few words that are one token, as in the released vocabularies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    first, last = "<|begin_of_text|>", "<|end_of_text|>"
    words = ("a", "of", "on", "cat", "dog", "caption", "grass", "longer")
    beginnings = list(dict.fromkeys(f"Ġ{word[:end]}" for word in words for end in range(1, len(word) + 1)))
    vocabulary = _numbered(first, last, *_bytes(), *beginnings)
    tokenizer = Tokenizer(models.BPE(vocabulary, [(start[:-1], start[-1]) for start in beginnings]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (first, last)])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
    )
    return {"tokenizer_object": tokenizer, "bos_token": first, "eos_token": last}


def _qwen() -> dict[str, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = _numbered(*_bytes(), *special)
    others = {"additional_special_tokens": special[1:], "chat_template": _QWEN_CHAT}
    return {"vocab": vocabulary, "merges": [], **others}


# The part of Qwen3's template that a caption meets, with the empty thought that it writes if thinking is off.
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


# Arguments of a tokenizer's constructor, by class.
_TOKENIZERS: dict[str, Callable[[], dict[str, Any]]] = {
    "BertTokenizer": _bert,
    "ChatGLMTokenizer": _chatglm,
    "CLIPTokenizer": _clip,
    "GemmaTokenizer": _gemma,
    "LlamaTokenizer": _llama,
    "PreTrainedTokenizerFast": _fast,
    "Qwen2Tokenizer": _qwen,
    "T5Tokenizer": _t5,
}
