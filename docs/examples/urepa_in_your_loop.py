"""U-REPA in a plain diffusers training loop: no spec, no sweep. What was added is marked.

python docs/examples/urepa_in_your_loop.py [steps] [folder for the model]

Trains a tiny UNet on scikit-learn's digits, on a CPU in a minute, aligned with an ImageNet EfficientNet-Lite0 whose
weights came with the installation. For your own model, replace UREPA's 64 by the width of its mid block, the encoder
by, say, DINOv2, and the 112 by that encoder's width.
"""

import sys

import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

from repa_lab.align import UREPA, Signals  # U-REPA
from repa_lab.encoders.encoder import load_encoder  # U-REPA
from repa_lab.models.tap import capture  # U-REPA


def main(steps: int = 300, folder: str | None = None) -> None:
    """Train, print what the alignment does, and save the UNet, which holds nothing of it."""
    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().images / 16 * 255).round().to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    noising = DDPMScheduler()
    encoder = load_encoder("efficientnet_lite0", image_size=64, resolution=8)  # U-REPA
    schedule = {"type": "cosine", "warmup_steps": 20, "decay_steps": steps}  # U-REPA
    regularizer = UREPA(64, 112, weight=0.5, manifold_weight=3.0, projector="linear", schedule=schedule)  # U-REPA
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": regularizer.parameters()})  # U-REPA

    with capture(unet.mid_block) as tap:  # U-REPA
        for step in range(steps):
            images = pixels[torch.randint(len(pixels), (32,))]
            x, noise = images.float() / 127.5 - 1, torch.randn(32, 1, 8, 8)
            t = torch.randint(noising.config.num_train_timesteps, (32,))
            loss = (unet(noising.add_noise(x, noise, t), t).sample - noise).square().mean()
            if regularizer.is_active(step):  # U-REPA: at weight 0 the encoder need not run
                alignment = regularizer(Signals(taps=(tap.take(),), encoders=(encoder(images),)), step)  # U-REPA
                loss = loss + regularizer.weight_at(step) * alignment.value  # U-REPA
                if step % 20 == 1:
                    parts = ", ".join(f"{name} {value:.4f}" for name, value in alignment.parts.items())
                    print(f"step {step}: {parts}", flush=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    if folder:
        unet.save_pretrained(folder)


if __name__ == "__main__":
    main(*(convert(word) for convert, word in zip((int, str), sys.argv[1:], strict=False)))
