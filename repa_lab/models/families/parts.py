"""Components of tiny pipelines that several families share: of the released components' classes, a thousandth of their size."""

from __future__ import annotations

from typing import Any

from repa_lab.models.pipeline import Part

# Of the tiny tokenizers, whatever their class: the printable characters, their forms and the special tokens.
VOCABULARY = 1000

# What is called like this, beside the rest of attention, in blocks that hold the text's stream beside the image's.
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

CLIP_TOKENIZER = Part("transformers.CLIPTokenizer", {"model_max_length": 77})
T5_TOKENIZER = Part("transformers.T5Tokenizer", {"model_max_length": 512})


def clip_text(width: int, **config: Any) -> Part:
    """CLIP's text encoder; ``projection_dim`` gives the class that projects the pooled text."""
    kind = "CLIPTextModelWithProjection" if "projection_dim" in config else "CLIPTextModel"
    small = {"vocab_size": VOCABULARY, "intermediate_size": width, "num_attention_heads": 2, "num_hidden_layers": 3}
    ends = {"bos_token_id": 512, "eos_token_id": 513}  # of the tiny vocabulary; it pools at the latter
    return Part(f"transformers.{kind}", {"hidden_size": width, **small, **ends, **config})


def t5_text(width: int, name: str = "T5EncoderModel", **config: Any) -> Part:
    """T5's encoder, or one of its relatives'."""
    small = {"vocab_size": VOCABULARY, "d_ff": width, "d_kv": 4, "num_heads": 2, "num_layers": 2}
    return Part(f"transformers.{name}", {"d_model": width, **small, **config})


_SMALL_AUTOENCODER = {
    "block_out_channels": (4, 4, 4, 4),
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "sample_size": 64,
}


def kl_autoencoder(channels: int, scaling: float, shift: float | None = None, **config: Any) -> Part:
    """The autoencoder of Stable Diffusion and most after it, which shrinks eightfold."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    scale = {"latent_channels": channels, "scaling_factor": scaling, "shift_factor": shift}
    return Part("diffusers.AutoencoderKL", {**_SMALL_AUTOENCODER, **blocks, **scale, **config})


FLUX2_AUTOENCODER = Part("diffusers.AutoencoderKLFlux2", {**_SMALL_AUTOENCODER, "latent_channels": 2})

QWEN_AUTOENCODER = Part(
    "diffusers.AutoencoderKLQwenImage",
    {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": (-0.7571, -0.7089, -0.9113, 0.1075),
        "latents_std": (2.8184, 1.4541, 2.3275, 2.6558),
    },
)


def flow_scheduler(**config: Any) -> Part:
    """The scheduler of flow matching, with the released settings."""
    return Part("diffusers.FlowMatchEulerDiscreteScheduler", config)


# Of Stable Diffusion, its first and its larger one.
LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
EULER = Part("diffusers.EulerDiscreteScheduler", {**LATENT_BETAS, "timestep_spacing": "leading"})
