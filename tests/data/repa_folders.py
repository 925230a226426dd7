"""Folders as REPA's own preprocessing writes them, from what is known of its format: no code of ours takes part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image


def write_repa_folder(
    root: Path,
    images: Sequence[Image.Image],
    labels: Sequence[int] | None,
    vae: AutoencoderKL,
    shape: tuple[int, ...] = (1,),
) -> Path:
    """``images`` are written as they are; ``shape`` stands before that of the latents."""
    said: dict[str, list] = {"images": [], "vae-sd": []}
    for number, image in enumerate(images):
        digits = f"{number:08d}"
        names = {"images": f"{digits[:5]}/img{digits}.png", "vae-sd": f"{digits[:5]}/img-mean-std-{digits}.npy"}
        for tree, name in names.items():
            (root / tree / name).parent.mkdir(parents=True, exist_ok=True)
            said[tree].append([name, labels[number] if labels else None])
        image.save(root / "images" / names["images"], compress_level=0)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latent = vae.encode(x).latent_dist
        moments = torch.cat([latent.mean, latent.std], dim=1)[0].numpy()
        np.save(root / "vae-sd" / names["vae-sd"], moments.reshape(*shape, *moments.shape))
    for tree, rows in said.items():
        (root / tree / "dataset.json").write_text(json.dumps({"labels": rows if labels else None}))
    return root
