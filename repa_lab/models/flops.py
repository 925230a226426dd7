"""The FLOPs and the memory of a denoiser's forward pass, from formulas and counts. Imports no torch.

FLOPs are twice the multiply-adds of matrix products, convolutions and attention, as `torch.utils.flop_counter` counts
them. Those of SiT and SiT-down follow from their shapes. All others were counted on the meta device by
:mod:`tests.models.counting`, and a test counts them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from repa_lab.models.family import SIT, SIT_DOWN, UNET, Family, Shape, network_of, shape_of, swiglu_width

TEXT_TOKENS = 256  # of the text in every counted forward pass
_TIME_FEATURES = 256


@dataclass(frozen=True)
class Forward:
    """The forward pass of one image.

    Attributes:
        flops: FLOPs of the pass.
        kept: numbers kept for the backward pass, where attention keeps as few as flash attention.
        parameters: number of parameters of the denoiser.
        kept_frozen: share of ``kept`` that remains if the weights are frozen, as with LoRA.
        kept_checkpointed: share of ``kept`` that remains with gradient checkpointing: the inputs of all blocks, and
            what the largest block keeps while the backward pass runs it again; 1 for models that have none.
        adapted: sum of the inputs and outputs of the layers that LoRA adapts; rank r adds r times as many weights.
        second_time_flops: what a second time in an image adds to ``flops``.
        second_time_kept: what a second time adds to ``kept``.
    """

    flops: float
    kept: float
    parameters: int
    kept_frozen: float = 1.0
    kept_checkpointed: float = 1.0
    adapted: int = 0
    second_time_flops: float = 0.0
    second_time_kept: float = 0.0


@dataclass(frozen=True)
class Counted:
    """Counts of a released model at its native size and at a half and a quarter of that side.

    The cost of every layer is constant, linear or quadratic in the number of tokens, so the parabola through the three
    counts gives the cost at any size exactly.

    Attributes:
        tokens: image tokens at the tap at the native size.
        gflops: 10^9 FLOPs of a forward pass at the three sizes, with a text of :data:`TEXT_TOKENS`.
        kept: 10^6 numbers kept for the backward pass at the three sizes.
        frozen: share of ``kept`` that remains if the weights are frozen, at the native size.
        checkpointed: share of ``kept`` that remains with gradient checkpointing, at the native size.
        adapted: sum of the inputs and outputs of the layers that LoRA adapts.
    """

    tokens: int
    gflops: tuple[float, float, float]
    kept: tuple[float, float, float]
    frozen: float = 1.0
    checkpointed: float = 1.0
    adapted: int = 0

    def at(self, tokens: float, parameters: int) -> Forward:
        """Return the forward pass of an image of so many tokens."""
        flops, kept = (_parabola(self.tokens, values, tokens) for values in (self.gflops, self.kept))
        return Forward(flops * 1e9, kept * 1e6, parameters, self.frozen, self.checkpointed, self.adapted)


COUNTED: dict[str, Counted] = {
    "sd15": Counted(64, (818.41, 189.04, 53.226), (495.04, 128.73, 37.149), 0.79, 0.234, 199_296),
    "sdxl": Counted(1024, (6958.3, 1729.6, 554.48), (3677.2, 951.66, 270.28), 0.73, 0.101, 1_451_520),
    "kolors": Counted(1024, (6962.6, 1733.9, 558.78), (3678.2, 952.71, 271.33), 0.73, 0.101, 1_451_520),
    "sd3": Counted(4096, (8702.3, 1975.2, 728.26), (3385.2, 992.42, 394.21), 0.48, 0.093, 586_752),
    "sana": Counted(1024, (2940, 816.04, 285.04), (1736.9, 455.41, 135.04), 0.78, 0.081, 716_800),
    "pixart": Counted(4096, (6603.3, 1275.8, 324.46), (3336.4, 848.14, 226.07), 0.48, 0.079, 516_096),
    "hidream": Counted(4096, (84591, 27377, 14523), (25975, 9264.2, 5086.5), 0.64, 0.046, 983_040),
    "auraflow": Counted(4096, (43968, 11244, 4367.4), (12412, 3667.2, 1481), 0.62, 0.068, 983_040),
    "lumina2": Counted(4096, (23829, 5997.8, 2301), (10607, 3117.3, 1245), 0.56, 0.133, 460_800),
    "dit": Counted(256, (237.33, 58.157, 14.849), (174.73, 43.982, 11.296), 0.48, 0.086, 258_048),
    "hunyuan_dit": Counted(4096, (14366, 2953.5, 764.74), (6471.6, 1665.5, 463.92), 0.63, 1, 870_400),
    "cogview4": Counted(4096, (57769, 15194, 5903), (11608, 3411.4, 1362.2), 0.52, 0.082, 917_504),
    "flux": Counted(4096, (69467, 17686, 6806.8), (17074, 5022.7, 2009.7), 0.51, 0.066, 1_634_304),
    "flux2": Counted(4096, (265324, 72659, 28552), (38397, 11294, 4518.5), 0.63, 0.061, 5_210_112),
    "chroma": Counted(4096, (69651, 17871, 6991.6), (17121, 5068.9, 2056), 0.51, 1, 1_634_304),
    "qwen_image": Counted(4096, (73128, 18623, 7170.6), (20111, 5916.9, 2368.4), 0.48, 0.058, 2_949_120),
    "z_image": Counted(4096, (58539, 15291, 5928.7), (18057, 5306.7, 2119), 0.53, 0.063, 1_044_480),
    "kandinsky5": Counted(4096, (47134, 10490, 2839.4), (18040, 4636, 1285), 0.47, 0.05, 2_088_960),
    "longcat_image": Counted(4096, (36565, 9311.2, 3584.9), (9005.8, 2648.9, 1059.7), 0.51, 0.085, 860_160),
    "ernie_image": Counted(4096, (79528, 21076, 8202.4), (21358, 6282.3, 2513.4), 0.58, 0.064, 1_179_648),
    "wan": Counted(900, (2519.83, 659.669, 202.256), (1533.65, 420.76, 130.586), 0.50, 0.064, 737_280),
    "ltxvideo": Counted(256, (998.908, 341.979, 180.39), (519.591, 176.261, 90.4289), 0.48, 0.073, 917_504),
    "krea2": Counted(4096, (120010, 33419, 13800), (23177, 7153, 3146.9), 0.56, 0.091, 1_200_128),
}

# By size: the parameters for 4 channels and 1,000 classes, then the counts at 64x64, 32x32 and 16x16 cells.
COUNTED_UNETS: dict[str, tuple[int, Counted]] = {
    "nano": (831_204, Counted(1024, (3.13329, 0.582107, 0.133054), (8.34224, 2.08765, 0.524), checkpointed=0.638)),
    "S": (43_363_588, Counted(256, (64.1027, 14.9098, 3.6615), (53.802, 13.4605, 3.3751), checkpointed=0.556)),
    "B": (263_908_804, Counted(64, (159.375, 38.1901, 9.45869), (84.151, 21.0552, 5.28128), checkpointed=0.556)),
    "narrow-nano": (
        414_372,
        Counted(1024, (1.55619, 0.288465, 0.0659046), (5.78634, 1.44867, 0.364256), checkpointed=0.592),
    ),
    "narrow-S": (
        536_708,
        Counted(256, (1.46237, 0.283902, 0.065962), (5.75453, 1.44144, 0.363168), checkpointed=0.584),
    ),
    "narrow-B": (659_044, Counted(64, (1.45781, 0.283959, 0.0660685), (5.7473, 1.44035, 0.363616), checkpointed=0.582)),
}

# The autoencoder of Stable Diffusion at 512, 256 and 128 pixels; `tokens` are latent cells.
VAE_ENCODER = Counted(4096, (1116.66, 272.722, 67.7779), (0, 0, 0))
VAE_DECODER = Counted(4096, (2514.52, 622.187, 155.144), (0, 0, 0))


def forward_of(family: Family, size: str | None, tokens: float, channels: int, classes: int) -> Forward:
    """Return the forward pass of an image of so many tokens at the suggested tap.

    A denoiser from scratch has a size, input channels, and classes without the null label.
    """
    if family.name in COUNTED:
        return COUNTED[family.name].at(tokens, network_of(family).parameters)
    if not family.from_scratch:
        return _estimate(network_of(family).parameters, family.shapes[""], tokens)
    return FROM_SCRATCH[family.name](size or "", tokens, channels, classes)


def _estimate(parameters: int, shape: Shape, tokens: float) -> Forward:
    """Return an estimate for a plugin's family: every weight works on every token, and blocks are like SiT's."""
    depth, width = shape.depth, shape.width
    kept, checkpointed = 21 * depth * tokens * width, (depth + 21) / (21 * depth)
    return Forward(2 * parameters * tokens, kept, parameters, 0.5, checkpointed, adapted=8 * depth * width)


def _sit_forward(size: str, tokens: float, channels: int, classes: int) -> Forward:
    """Return the forward pass of a SiT.

    A block has 12 D^2 weights at every token and 6 D^2 at every image, and two products of attention. It keeps 21
    numbers per token and channel, its input among them; the rest of the model keeps 3 more. What is kept for an image
    as a whole is left out. What depends on the time alone is computed once more for a second time, and chosen for each
    token.
    """
    shape = shape_of(SIT, size)
    width, depth = shape.width, shape.depth
    macs, parameters = _ends(width, tokens, shape.stride**2 * channels, classes)
    macs += depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2)
    parameters += int(tokens) * width + depth * (18 * width**2 + 15 * width)
    return Forward(
        2 * macs,
        (21 * depth + 3) * tokens * width,
        parameters,
        kept_checkpointed=(depth + 3 + 20) / (21 * depth + 3),
        second_time_flops=2 * (_TIME_FEATURES * width + (3 + 6 * depth) * width**2),
        second_time_kept=8 * depth * tokens * width,
    )


def _sit_down_forward(size: str, tokens: float, channels: int, classes: int) -> Forward:
    """Return the forward pass of a SiT-down, whose outer stages have four times as many tokens as the middle one.

    A block has 4 D^2 weights of attention and 3 D H of SwiGLU at every token, and 6 D^2 at every image. The two 3x3
    convolutions have 36 D^2 weights each, over the tokens of the middle. A block keeps 15 numbers per token and channel
    and 4 per hidden channel, its input among them. The rest of the model keeps 3 per channel of the outer tokens, and
    the inputs of both convolutions; what is kept for an image as a whole is left out.
    """
    shape = shape_of(SIT_DOWN, size)
    width, (before, middle, after) = shape.width, shape.stages
    hidden, outer = swiglu_width(width), before + after
    weights, convolutions = 4 * width**2 + 3 * width * hidden, 72 * width**2
    macs, parameters = _ends(width, 4 * tokens, (shape.stride // 2) ** 2 * channels, classes)
    macs += tokens * convolutions
    for blocks, count in ((outer, 4 * tokens), (middle, tokens)):
        macs += blocks * (count * weights + 2 * count**2 * width + 6 * width**2)
    in_block, blocks_of_tokens = 15 * width + 4 * hidden, 4 * outer + middle
    kept = blocks_of_tokens * in_block + 17 * width
    checkpointed = (blocks_of_tokens * width + 4 * (in_block - width) + 17 * width) / kept
    parameters += convolutions + 5 * width + shape.depth * (weights + 6 * width**2 + 11 * width + 2 * hidden)
    return Forward(2 * macs, tokens * kept, parameters, kept_checkpointed=checkpointed)


def _ends(width: int, tokens: float, pixels: int, classes: int) -> tuple[float, int]:
    """Return the multiply-adds and the parameters around SiT's blocks: patches, time, labels and the final layer."""
    macs = 2 * tokens * pixels * width + _TIME_FEATURES * width + 3 * width**2
    ends = pixels * width + width + width * pixels + pixels + 2 * width**2 + 2 * width
    embedded = (_TIME_FEATURES + 1) * width + width**2 + width + (classes + 1) * width
    return macs, ends + embedded


def _unet_forward(size: str, tokens: float, channels: int, classes: int) -> Forward:
    """Return the counted forward pass of a UNet, corrected for its channels and classes."""
    shape, (parameters, counted) = shape_of(UNET, size), COUNTED_UNETS[size]
    more, first = channels - 4, shape.channels[0]
    both = 2 * 9 * first * more  # weights of the first and the last convolution
    parameters += both + more + (classes - 1000) * 4 * first
    forward = counted.at(tokens, parameters)
    return replace(forward, flops=forward.flops + 2 * both * tokens * shape.stride**2)


FROM_SCRATCH: dict[str, Callable[[str, float, int, int], Forward]] = {
    "sit": _sit_forward,
    "sit_down": _sit_down_forward,
    "unet": _unet_forward,
}


def _parabola(native: int, values: tuple[float, float, float], tokens: float) -> float:
    """Return the parabola through the values at ``native`` tokens, a quarter and a sixteenth of them (Lagrange)."""
    x = 16 * tokens / native
    whole, half, quarter = values
    return whole * (x - 4) * (x - 1) / 180 + half * (x - 16) * (x - 1) / -36 + quarter * (x - 16) * (x - 4) / 45
