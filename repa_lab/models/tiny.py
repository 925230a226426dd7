"""Tiny random pipelines of diffusers with the classes of the released ones, for tests and rehearsals.

Imports no torch before one is built: the families name their components.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import inspect
import logging
import string
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from repa_lab.models.family import Component, Family, network_of, pipeline_of

# Size of the vocabularies of the tiny tokenizers: printable characters, their forms and special tokens.
VOCABULARY = 1000
# A tokenizer, or a processor that has one, and the text encoder that reads its tokens.
Text = tuple[Component, Component]


def tiny_pipeline(vae: Component, scheduler: Component, *texts: Text, **others: Component) -> dict[str, Component]:
    """Return :attr:`Pipeline.tiny`, whose texts are numbered as in diffusers: ``text_encoder``, ``text_encoder_2``."""
    named = {"vae": vae}
    for number, (tokenizer, encoder) in enumerate(texts, start=1):
        suffix = f"_{number}" if number > 1 else ""
        named |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    return {**named, **others, "scheduler": scheduler}


def tiny_transformer(**config: Any) -> dict[str, Any]:
    """Return :attr:`Network.tiny` of a transformer: three blocks of two heads, unless the config says otherwise."""
    return {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, **config}


_T5_TOKENIZER = Component("transformers.T5Tokenizer", {"model_max_length": 512})
_GEMMA_TOKENIZER = Component("transformers.GemmaTokenizer", {"add_bos_token": True})
_END = {"pad_token": "<|end_of_text|>"}
LLAMA_TOKENIZER = Component("transformers.PreTrainedTokenizerFast", _END)
LEFT_TOKENIZER = Component("transformers.PreTrainedTokenizerFast", {**_END, "padding_side": "left"})
PIXTRAL_PROCESSOR = Component(
    "transformers.PixtralProcessor",
    {
        "image_processor": Component("transformers.PixtralImageProcessor"),
        "tokenizer": LEFT_TOKENIZER,
        "chat_template": "{% for message in messages %}[{{ message.role }}]{{ message.content[0].text }}{% endfor %}",
    },
)
QWEN_TOKENIZER = Component("transformers.Qwen2Tokenizer")
QWEN_PROCESSOR = Component(
    "transformers.Qwen2VLProcessor",
    {
        "image_processor": Component("transformers.Qwen2VLImageProcessor"),
        "video_processor": Component("transformers.Qwen2VLVideoProcessor"),
        "tokenizer": QWEN_TOKENIZER,
    },
)


def clip(width: int, **config: Any) -> Text:
    """Return CLIP's text encoder; ``projection_dim`` selects the class that projects the pooled text."""
    name = "CLIPTextModelWithProjection" if "projection_dim" in config else "CLIPTextModel"
    small = {"vocab_size": VOCABULARY, "intermediate_size": width, "num_attention_heads": 2, "num_hidden_layers": 3}
    ends = {"bos_token_id": 512, "eos_token_id": 513}  # in the tiny vocabulary; the text is pooled at the latter
    encoder = Component(f"transformers.{name}", {"hidden_size": width, **small, **ends, **config})
    return Component("transformers.CLIPTokenizer", {"model_max_length": 77}), encoder


def t5(width: int, name: str = "T5EncoderModel", tokenizer: Component = _T5_TOKENIZER) -> Text:
    """Return T5's encoder, or that of a relative."""
    small = {"vocab_size": VOCABULARY, "d_ff": width, "d_kv": 4, "num_heads": 2, "num_layers": 2}
    return tokenizer, Component(f"transformers.{name}", {"d_model": width, **small})


_SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
# The released ids are beyond the tiny vocabulary.
_NO_ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
# The image encoders, which no caption reaches.
_VISION = {"hidden_size": 8, "intermediate_size": 8}
_QWEN_VISION = {**_VISION, "depth": 1, "num_heads": 2}
_PIXTRAL_VISION = {**_VISION, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2}


def _rotary(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": base}  # half a head: time, row, column


def _text(width: int, **config: Any) -> dict[str, Any]:
    return {**_SMALL, **_NO_ENDS, "hidden_size": width, "intermediate_size": width, "head_dim": 4, **config}


def language_model(name: str, width: int, **config: Any) -> Component:
    """Return a language model of transformers that reads text alone."""
    return Component(f"transformers.{name}", _text(width, **config))


def gemma(width: int, **config: Any) -> Text:
    """Return Gemma 2 without its language head."""
    return _GEMMA_TOKENIZER, language_model("Gemma2Model", width, **config)


def qwen_vl(width: int) -> Component:
    """Qwen2.5-VL, which reads text and images."""
    vision = {**_QWEN_VISION, "fullatt_block_indexes": [0], "out_hidden_size": width}
    text = _text(width, num_attention_heads=width // 4, rope_parameters=_rotary(1e6))
    return Component("transformers.Qwen2_5_VLForConditionalGeneration", {"text_config": text, "vision_config": vision})


def qwen3_vl(width: int, layers: int) -> Component:
    """Qwen3-VL without its language head."""
    vision = {**_QWEN_VISION, "out_hidden_size": width, "deepstack_visual_indexes": [0]}
    text = _text(width, num_hidden_layers=layers, rope_parameters=_rotary(5e6))
    return Component("transformers.Qwen3VLModel", {"text_config": text, "vision_config": vision})


def mistral_vl(name: str, width: int, **config: Any) -> Component:
    """Mistral Small 3 or a relative, which reads text and images."""
    text = {"model_type": "mistral", **_text(width, **config)}
    return Component(f"transformers.{name}", {"text_config": text, "vision_config": _PIXTRAL_VISION})


_SMALL_AUTOENCODER = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 64}


def kl_autoencoder(channels: int, scaling: float, shift: float | None = None) -> Component:
    """Return the autoencoder of Stable Diffusion and most later families; it shrinks images eightfold."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    scale = {"latent_channels": channels, "scaling_factor": scaling, "shift_factor": shift}
    return Component("diffusers.AutoencoderKL", {**_SMALL_AUTOENCODER, **blocks, **scale})


FLUX_AUTOENCODER = kl_autoencoder(4, 0.3611, 0.1159)
FLUX2_AUTOENCODER = Component("diffusers.AutoencoderKLFlux2", {**_SMALL_AUTOENCODER, "latent_channels": 2})
# Qwen-Image took Wan's autoencoder, for single images.
_WAN_SETTINGS = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": (-0.7571, -0.7089, -0.9113, 0.1075),
    "latents_std": (2.8184, 1.4541, 2.3275, 2.6558),
}
WAN_AUTOENCODER = Component("diffusers.AutoencoderKLWan", _WAN_SETTINGS)
QWEN_AUTOENCODER = Component("diffusers.AutoencoderKLQwenImage", _WAN_SETTINGS)


def flow_scheduler(**config: Any) -> Component:
    """Return the scheduler of flow matching, with the released settings."""
    return Component("diffusers.FlowMatchEulerDiscreteScheduler", config)


# Flow matching in the schedulers of the older noise, as the conversions to diffusers set them.
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# The noise of Stable Diffusion 1.5 and XL.
LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
EULER = Component("diffusers.EulerDiscreteScheduler", {**LATENT_BETAS, "timestep_spacing": "leading"})


def write_tiny_pipeline(family: Family, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a random pipeline of the family's own classes, laid out as a released one.

    Args:
        config: arguments of the denoiser that replace those of :attr:`Network.tiny`.
    """
    import diffusers
    import torch
    from torch import nn

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
        pipeline_class(**{**absent, **components, family.kind: net}).save_pretrained(folder)


def build_net(family: Family, config: Mapping[str, Any]) -> Any:
    """Build a freshly initialised model of a family from arguments of its constructor."""
    import diffusers

    return getattr(diffusers, network_of(family).model)(**config)


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
    from torch import nn

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
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        bars.disable_progress_bar()
        yield
    logging.disable(logging.NOTSET)
    bars.enable_progress_bar()


# Arguments of the released classes' tokenizers, in whose vocabularies every printable character is one token.

_LETTERS = tuple(string.printable.strip())


def _bytes() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _numbered(*tokens: str) -> dict[str, Any]:
    assert len(set(tokens)) == len(tokens) <= VOCABULARY
    return {"vocab": {token: number for number, token in enumerate(tokens)}}


def _clip() -> dict[str, Any]:
    ends = [f"{character}</w>" for character in _bytes()]
    return {**_numbered(*_bytes(), *ends, "<|startoftext|>", "<|endoftext|>"), "merges": []}


def _t5() -> dict[str, Any]:
    letters = [("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return {"vocab": vocabulary, "extra_ids": 0, "additional_special_tokens": []}


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
    vocabulary = _numbered(first, last, *_bytes(), *beginnings)["vocab"]
    tokenizer = Tokenizer(models.BPE(vocabulary, [(start[:-1], start[-1]) for start in beginnings]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (first, last)])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
    )
    return {"tokenizer_object": tokenizer, "bos_token": first, "eos_token": last}


def _qwen() -> dict[str, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
    others = {"additional_special_tokens": special[1:], "chat_template": _QWEN_CHAT}
    return {**_numbered(*_bytes(), *special), "merges": [], **others}


# The part of Qwen3's template that a caption meets, with the empty thought that it writes if thinking is off.
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


_TOKENIZERS: dict[str, Callable[[], dict[str, Any]]] = {
    "BertTokenizer": lambda: _numbered(
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)
    ),
    "ChatGLMTokenizer": _chatglm,
    "CLIPTokenizer": _clip,
    "GemmaTokenizer": lambda: {
        **_numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable),
        "merges": [],
    },
    "LlamaTokenizer": lambda: {**_numbered("<unk>", "<s>", "</s>", "<pad>", "▁", *_LETTERS), "merges": []},
    "PreTrainedTokenizerFast": _fast,
    "Qwen2Tokenizer": _qwen,
    "T5Tokenizer": _t5,
}
