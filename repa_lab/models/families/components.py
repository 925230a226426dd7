"""Components that the tiny pipelines of several families share: the released classes at a thousandth of their size."""

from __future__ import annotations

from typing import Any

from repa_lab.models.family import Component

# Size of the vocabularies of the tiny tokenizers: printable characters, their forms and special tokens.
VOCABULARY = 1000

CLIP_TOKENIZER = Component("transformers.CLIPTokenizer", {"model_max_length": 77})
T5_TOKENIZER = Component("transformers.T5Tokenizer", {"model_max_length": 512})
GEMMA_TOKENIZER = Component("transformers.GemmaTokenizer", {"add_bos_token": True})
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


def clip_text(width: int, **config: Any) -> Component:
    """CLIP's text encoder; ``projection_dim`` selects the class that projects the pooled text."""
    name = "CLIPTextModelWithProjection" if "projection_dim" in config else "CLIPTextModel"
    small = {"vocab_size": VOCABULARY, "intermediate_size": width, "num_attention_heads": 2, "num_hidden_layers": 3}
    ends = {"bos_token_id": 512, "eos_token_id": 513}  # in the tiny vocabulary; the text is pooled at the latter
    return Component(f"transformers.{name}", {"hidden_size": width, **small, **ends, **config})


def t5_text(width: int, name: str = "T5EncoderModel") -> Component:
    """T5's encoder, or that of a relative."""
    small = {"vocab_size": VOCABULARY, "d_ff": width, "d_kv": 4, "num_heads": 2, "num_layers": 2}
    return Component(f"transformers.{name}", {"d_model": width, **small})


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


# The noise of Stable Diffusion 1.5 and XL.
LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
EULER = Component("diffusers.EulerDiscreteScheduler", {**LATENT_BETAS, "timestep_spacing": "leading"})
