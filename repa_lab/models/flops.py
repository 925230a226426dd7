"""What one image costs a denoiser: closed formulas and counted numbers, without torch, so that `plan` can tell at once.

FLOPs are twice the multiply-adds of matrix products, convolutions and attention, as `torch.utils.flop_counter` counts
them. SiT's and SiT-down's follow from their shapes. All others were counted on the meta device by
`repa_lab.models.counting`, and a test counts them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from repa_lab.models.facts import Family, Shape, network_of, shape_of, swiglu_width

TEXT_TOKENS = 256  # of a text, where there is one, in every counted forward pass
_TIME_FEATURES = 256


@dataclass(frozen=True)
class Forward:
    """The forward pass of one image.

    Attributes:
        flops: of the pass.
        kept: numbers kept for the backward pass, attention's as flash attention keeps them.
        parameters: of the denoiser.
        kept_frozen: the share of ``kept`` that is left where the weights are frozen, as under LoRA.
        adapted: inputs and outputs of the layers that LoRA adapts, summed: a rank r has r times as many weights.
    """

    flops: float
    kept: float
    parameters: int
    kept_frozen: float = 1.0
    adapted: int = 0


@dataclass(frozen=True)
class Counted:
    """Counts of a released model at its native size and at a half and a quarter of its sides.

    Every layer costs a constant, or as many times as there are tokens, or as pairs of them, so that a parabola through
    the three counts gives any other size exactly.

    Attributes:
        tokens: image tokens at the tap at the native size.
        gflops: of a forward pass at the three sizes, in 10^9, with a text of :data:`TEXT_TOKENS`.
        kept: see :class:`Forward`, in 10^6, at the three sizes.
        frozen: see :attr:`Forward.kept_frozen`, at the native size.
        adapted: see :class:`Forward`.
    """

    tokens: int
    gflops: tuple[float, float, float]
    kept: tuple[float, float, float]
    frozen: float = 1.0
    adapted: int = 0

    def at(self, tokens: float, parameters: int) -> Forward:
        """The forward pass of an image of so many tokens."""
        flops, kept = (_parabola(self.tokens, values, tokens) for values in (self.gflops, self.kept))
        return Forward(flops * 1e9, kept * 1e6, parameters, self.frozen, self.adapted)


COUNTED: dict[str, Counted] = {
    "sd15": Counted(64, (818.41, 189.04, 53.226), (495.04, 128.73, 37.149), 0.79, 199_296),
    "sdxl": Counted(1024, (6958.3, 1729.6, 554.48), (3677.2, 951.66, 270.28), 0.73, 1_451_520),
    "kolors": Counted(1024, (6962.6, 1733.9, 558.78), (3678.2, 952.71, 271.33), 0.73, 1_451_520),
    "sd3": Counted(4096, (8702.3, 1975.2, 728.26), (3385.2, 992.42, 394.21), 0.48, 586_752),
    "sana": Counted(1024, (2940, 816.04, 285.04), (1736.9, 455.41, 135.04), 0.78, 716_800),
    "pixart": Counted(4096, (6603.3, 1275.8, 324.46), (3336.4, 848.14, 226.07), 0.48, 516_096),
    "hidream": Counted(4096, (84591, 27377, 14523), (25975, 9264.2, 5086.5), 0.64, 983_040),
    "auraflow": Counted(4096, (43968, 11244, 4367.4), (12412, 3667.2, 1481), 0.62, 983_040),
    "lumina2": Counted(4096, (23829, 5997.8, 2301), (10607, 3117.3, 1245), 0.56, 460_800),
    "dit": Counted(256, (237.33, 58.157, 14.849), (174.73, 43.982, 11.296), 0.48, 258_048),
    "hunyuan_dit": Counted(4096, (14366, 2953.5, 764.74), (6471.6, 1665.5, 463.92), 0.63, 870_400),
    "cogview4": Counted(4096, (57769, 15194, 5903), (11608, 3411.4, 1362.2), 0.52, 917_504),
    "flux": Counted(4096, (69467, 17686, 6806.8), (17074, 5022.7, 2009.7), 0.51, 1_634_304),
    "flux2": Counted(4096, (265324, 72659, 28552), (38397, 11294, 4518.5), 0.63, 5_210_112),
    "chroma": Counted(4096, (69651, 17871, 6991.6), (17121, 5068.9, 2056), 0.51, 1_634_304),
    "qwen_image": Counted(4096, (73128, 18623, 7170.6), (20111, 5916.9, 2368.4), 0.48, 2_949_120),
    "z_image": Counted(4096, (58539, 15291, 5928.7), (18057, 5306.7, 2119), 0.53, 1_044_480),
    "kandinsky5": Counted(4096, (47134, 10490, 2839.4), (18040, 4636, 1285), 0.47, 2_088_960),
    "longcat_image": Counted(4096, (36565, 9311.2, 3584.9), (9005.8, 2648.9, 1059.7), 0.51, 860_160),
    "ernie_image": Counted(4096, (79528, 21076, 8202.4), (21358, 6282.3, 2513.4), 0.58, 1_179_648),
    "krea2": Counted(4096, (120010, 33419, 13800), (23177, 7153, 3146.9), 0.56, 1_200_128),
}

# By size: the parameters with 4 channels and 1,000 classes, then the counts at 64x64 cells, 32x32 and 16x16.
COUNTED_UNETS: dict[str, tuple[int, Counted]] = {
    "nano": (831_204, Counted(1024, (3.13329, 0.582107, 0.133054), (8.34224, 2.08765, 0.524))),
    "S": (43_363_588, Counted(256, (64.1027, 14.9098, 3.6615), (53.802, 13.4605, 3.3751))),
    "B": (263_908_804, Counted(64, (159.375, 38.1901, 9.45869), (84.151, 21.0552, 5.28128))),
    "narrow-nano": (414_372, Counted(1024, (1.55619, 0.288465, 0.0659046), (5.78634, 1.44867, 0.364256))),
    "narrow-S": (536_708, Counted(256, (1.46237, 0.283902, 0.065962), (5.75453, 1.44144, 0.363168))),
    "narrow-B": (659_044, Counted(64, (1.45781, 0.283959, 0.0660685), (5.7473, 1.44035, 0.363616))),
}
_UNET_CHANNELS, _UNET_CLASSES = 4, 1000

# Stable Diffusion's autoencoder at 512, 256 and 128 pixels; `tokens` are latent cells.
VAE_ENCODER = Counted(4096, (1116.66, 272.722, 67.7779), (0, 0, 0))
VAE_DECODER = Counted(4096, (2514.52, 622.187, 155.144), (0, 0, 0))


@dataclass(frozen=True)
class Given:
    """What a denoiser from scratch is built for and shown.

    Attributes:
        size: of the family.
        shape: of that size.
        tokens: of the image at the suggested tap.
        channels: of what the denoiser sees.
        classes: without the null label.
    """

    size: str
    shape: Shape
    tokens: float
    channels: int
    classes: int


def forward_of(family: Family, size: str | None, tokens: float, channels: int, classes: int) -> Forward:
    """The forward pass of one image through a family's denoiser.

    Args:
        family: which one.
        size: of one that is trained from scratch.
        tokens: of the image at the suggested tap.
        channels: of what the denoiser sees (for those from scratch).
        classes: without the null label (for those from scratch).
    """
    if family.from_scratch:
        return FROM_SCRATCH[family.name](Given(size or "", shape_of(family, size), tokens, channels, classes))
    return COUNTED[family.name].at(tokens, network_of(family).parameters)


def _sit_forward(given: Given) -> Forward:
    """SiT from its shape: per block 12 D^2 weights at every token, 6 D^2 at every image, and two products of attention.

    Kept are 21 numbers per block, token and channel, as counted, with 3 more around the blocks.
    """
    n, width, depth = given.tokens, given.shape.width, given.shape.depth
    around, ends = _ends(given, n, patch=given.shape.stride)
    macs = around + depth * (12 * n * width**2 + 2 * n**2 * width + 6 * width**2)
    parameters = ends + int(n) * width + depth * (18 * width**2 + 15 * width)
    return Forward(2 * macs, (21 * depth + 3) * n * width, parameters)


def _sit_down_forward(given: Given) -> Forward:
    """SiT-down from its shape: per block 4 D^2 weights of attention and 3 D H of SwiGLU at every token, 6 D^2 at every
    image; two 3x3 convolutions of 4 D^2 channels over the middle's tokens.

    Kept are 15 numbers per block, token and channel and 4 per hidden channel, as counted, with 5 more around the
    blocks.
    """
    n, width, stages, hidden = given.tokens, given.shape.width, given.shape.stages, swiglu_width(given.shape.width)
    around, ends = _ends(given, 4 * n, patch=given.shape.stride // 2)
    weights, convolutions = 4 * width**2 + 3 * width * hidden, 72 * width**2
    outer, middle = stages[0] + stages[2], stages[1]
    macs = around + n * convolutions
    for blocks, m in ((outer, 4 * n), (middle, n)):
        macs += blocks * (m * weights + 2 * m**2 * width + 6 * width**2)
    block = weights + 6 * width**2 + 11 * width + 2 * hidden
    kept = n * ((4 * outer + middle) * (15 * width + 4 * hidden) + 20 * width)
    return Forward(2 * macs, kept, ends + convolutions + 5 * width + sum(stages) * block)


def _ends(given: Given, tokens: float, patch: int) -> tuple[float, int]:
    """Multiply-adds and parameters of what stands around SiT's blocks: patches, time, labels and the final layer."""
    width, pixels = given.shape.width, patch**2 * given.channels
    macs = 2 * tokens * pixels * width + _TIME_FEATURES * width + 3 * width**2
    ends = pixels * width + width + width * pixels + pixels + 2 * width**2 + 2 * width
    embedded = (_TIME_FEATURES + 1) * width + width**2 + width + (given.classes + 1) * width
    return macs, ends + embedded


def _unet_forward(given: Given) -> Forward:
    """The counted UNet with as many channels and classes as there are: its first and last convolution, and its labels."""
    parameters, counted = COUNTED_UNETS[given.size]
    more, first = given.channels - _UNET_CHANNELS, given.shape.channels[0]
    both = 2 * 9 * first * more
    parameters += both + more + (given.classes - _UNET_CLASSES) * 4 * first
    found = counted.at(given.tokens, parameters)
    return Forward(found.flops + 2 * both * given.tokens * given.shape.stride**2, found.kept, parameters)


FROM_SCRATCH: dict[str, Callable[[Given], Forward]] = {
    "sit": _sit_forward,
    "sit_down": _sit_down_forward,
    "unet": _unet_forward,
}


def _parabola(native: int, values: tuple[float, float, float], tokens: float) -> float:
    """The parabola through the values at ``native`` tokens, a quarter and a sixteenth of them (Lagrange)."""
    x = 16 * tokens / native
    whole, half, quarter = values
    return whole * (x - 4) * (x - 1) / 180 + half * (x - 16) * (x - 1) / -36 + quarter * (x - 16) * (x - 4) / 45
