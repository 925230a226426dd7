"""Methods beyond REPA and U-REPA: their settings here, without torch, and a file for each of their regularizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from repa_lab.align.needs import FrozenModel, Needs, Overhead, Sizes, TrainingFacts
from repa_lab.align.settings import (
    CosineTargetSettings,
    EncoderTargetSettings,
    ManifoldSettings,
    ProjectorSection,
    ProjectorSettings,
    RegularizerSettings,
    REPASettings,
    regularizer,
)
from repa_lab.settings import BlockIndex, Count, Fraction, LocalFile, NotNegative, Positive, UsedIf, later

_METHODS = "repa_lab.align.methods"


@regularizer("dispersive", f"{_METHODS}.dispersive:Dispersive")
class DispersiveSettings(RegularizerSettings):
    """Dispersive loss (2506.09027): drives the images of a batch apart; there is no teacher."""

    type: Literal["dispersive"] = "dispersive"
    loss: Literal["infonce_l2", "infonce_cosine", "hinge"] = "infonce_l2"
    """InfoNCE without positive pairs over squared distances or over cosines, or a squared hinge on the distances."""
    temperature: Annotated[float, Field(gt=0), UsedIf("loss", but=("hinge",))] = 1.0
    """Distances are divided by it: 1 in the released code, 0.5 in the paper; `hinge` has none."""
    margin: Annotated[float, Field(gt=0), UsedIf("loss", ("hinge",))] = 1.0
    """Distance below which `hinge` repels two images."""

    has_cosine: ClassVar[bool] = False
    adds_nothing: ClassVar[bool] = True  # the distances between images are few beside a denoiser

    def problems(self, facts: TrainingFacts) -> Iterator[tuple[str, str]]:
        """Yield the problems of all regularizers, and a forward pass with a single image."""
        yield from super().problems(facts)
        if facts.images < 2:
            advice = "raise train.batch_size or run.micro_batch, or use fewer processes"
            yield "type", f"dispersive compares the images of one forward pass, and there is only one: {advice}"


@regularizer("crepa", f"{_METHODS}.crepa:CREPA")
class CREPASettings(CosineTargetSettings):
    """CREPA (2506.09229): raises the cosine of a frame's tokens with an encoder's of that frame and its neighbours."""

    type: Literal["crepa"] = "crepa"
    distance: Count = 1
    """Latent frames between a frame and its neighbours, one before and one after it; 0 is REPA frame by frame."""
    tau: Annotated[float, Field(gt=0), UsedIf("distance", but=(0,))] = 1.0
    """A neighbour at distance d counts exp(-d / tau), the frame itself 1."""
    cumulative: Annotated[bool, UsedIf("distance", but=(0,))] = False
    """Compare with every neighbour up to `distance`, not with those at it alone."""
    normalize_neighbours: bool = False
    """Divide the sum of each frame by the sum of its weights, so that the loss is between -1 and 1."""
    normalize_frames: bool = True
    """Average over the frames of a clip; false sums over them, as the paper's formula does."""

    def problems(self, facts: TrainingFacts) -> Iterator[tuple[str, str]]:
        """Yield the problems of all regularizers, images in place of clips, and neighbours that no frame has."""
        yield from super().problems(facts)
        if facts.frames < 2:
            yield "type", "crepa compares the frames of clips, and the data have one frame each: use repa"
        elif self.distance >= facts.frames:
            message = f"a clip has {facts.frames} frames in the denoiser: distance must be 0 to {facts.frames - 1}"
            yield "distance", f"{message}, got {self.distance}"


class TwoBlockSettings(RegularizerSettings):
    """The settings of methods in which a later block of the denoiser teaches an earlier one."""

    teacher_block: BlockIndex | None = None
    """The block that teaches, 0-based, after `block_index`; null is at four sevenths of the depth (15 of XL's 28)."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer",)
    teacher_depth: ClassVar[float] = 4 / 7
    """The suggested place of the teacher, as a share of the depth."""

    def resolved(self, block_index: BlockIndex, total_steps: int, depth: int) -> Self:
        """Return the settings with both blocks; see :meth:`RegularizerSettings.resolved`."""
        settings = super().resolved(block_index, total_steps, depth)
        student = settings.block_index
        if settings.teacher_block is not None or not isinstance(student, int):
            return settings
        return settings.model_copy(update={"teacher_block": max(round(self.teacher_depth * depth) - 1, student + 1)})

    def problems(self, facts: TrainingFacts) -> Iterator[tuple[str, str]]:
        """Yield the problems of all regularizers, and a teacher that does not come after its student."""
        yield from super().problems(facts)
        student, teacher = self.block_index, self.teacher_block
        if isinstance(student, int) and isinstance(teacher, int) and teacher <= student:
            message = f"the teacher must come after the student: block_index is {student}, teacher_block {teacher}"
            yield "teacher_block", message


@regularizer("layersync", f"{_METHODS}.layersync:LayerSync")
class LayerSyncSettings(TwoBlockSettings):
    """LayerSync (2510.12581): raises the cosine of an early block's tokens with a later block's; nothing is trained."""

    type: Literal["layersync"] = "layersync"
    weight: NotNegative = 0.2
    """Lambda: the weight after warm-up. At 0 nothing is computed."""

    adds_nothing: ClassVar[bool] = True

    def needs(self) -> Needs:
        """Return both blocks, the student first."""
        return Needs(taps=(self.block_index, self.teacher_block))


@regularizer("sra2", f"{_METHODS}.sra2:SRA2")
class SRA2Settings(RegularizerSettings):
    """SRA2 (2601.17830): predicts the clean latents from a block's tokens."""

    type: Literal["sra2"] = "sra2"
    weight: NotNegative = 1.0
    """Lambda: the weight after warm-up. At 0 nothing is computed."""
    projector: ProjectorSection = ProjectorSettings()
    """The map from the denoiser's width to the latents of a token."""
    beta: Annotated[float, Field(gt=0)] = 0.05
    """Error at which the smooth L1 loss turns from squared to absolute."""
    normalize: bool = True
    """Give the latents of every image mean 0 and standard deviation 1, so that the loss has one scale for all VAEs."""

    has_cosine: ClassVar[bool] = False

    def needs(self) -> Needs:
        """Return the block, the clean latents, and the prediction, whose loss is compared with the regularizer's."""
        return Needs(taps=(self.block_index,), latents=True, prediction=True)

    def overhead(self, sizes: Sizes) -> Overhead:
        """Return the projector."""
        (tap,) = sizes.taps
        values = round(sizes.latents.dim * sizes.latents.number / tap.number)
        return self.projector.overhead(tap.dim, values, tap.number)


@regularizer("relation", f"{_METHODS}.relation:Relation")
class RelationSettings(EncoderTargetSettings):
    """Token relations (VideoREPA, 2505.23656; VA-VAE, 2501.01423): matches similarities of tokens, not the tokens."""

    type: Literal["relation"] = "relation"
    relation: ManifoldSettings = ManifoldSettings(distance="l1_margin")
    """Which pairs are compared, and how; the default is VideoREPA's."""

    has_cosine: ClassVar[bool] = False


@regularizer("haste", f"{_METHODS}.haste:HASTE")
class HASTESettings(REPASettings):
    """HASTE (2505.16792): REPA and the encoder's attention, until `schedule.cutoff_step`."""

    type: Literal["haste"] = "haste"  # type: ignore[assignment]
    attention_weight: NotNegative = 1.0
    """Weight of the attention loss within the regularizer. At 0 no attention is captured."""
    layers: Annotated[Positive | None, UsedIf("attention_weight", but=(0,))] = None
    """Blocks that learn attention, up to `block_index`, from as many last blocks of the encoder; null is 4 at most."""

    @property
    def attention(self) -> range:
        """The denoiser's blocks that learn attention."""
        block = self.block_index
        if not isinstance(block, int) or self.layers is None or not self.attention_weight:
            return range(0)
        return range(max(block + 1 - self.layers, 0), block + 1)

    def resolved(self, block_index: BlockIndex, total_steps: int, depth: int) -> Self:
        """Return the settings with a number of layers; see :meth:`RegularizerSettings.resolved`."""
        settings = super().resolved(block_index, total_steps, depth)
        block = settings.block_index
        if settings.layers is not None or not isinstance(block, int):
            return settings
        return settings.model_copy(update={"layers": min(4, block + 1)})

    def needs(self) -> Needs:
        """Return the block and the encoders, and the attention of as many blocks of both."""
        taught = tuple(range(-len(self.attention), 0))
        return Needs((self.block_index,), self.encoders, attention=tuple(self.attention), encoder_attention=taught)

    def overhead(self, sizes: Sizes) -> Overhead:
        """Return the projectors, the products of queries and keys on both sides, and a map of each.

        The encoder is taken to have as many heads as the denoiser.
        """
        projectors, (tap,) = super().overhead(sizes), sizes.taps
        # The encoder's products have no backward pass, which costs two forward passes.
        widths = sum(tap.dim + encoder.dim / 3 for encoder in sizes.encoders)
        pairs = len(self.attention) * tap.number**2
        maps = 2 * sizes.heads * len(sizes.encoders)
        return projectors._replace(macs=projectors.macs + pairs * widths, maps=pairs * maps)

    def problems(self, facts: TrainingFacts) -> Iterator[tuple[str, str]]:
        """Yield the problems of all regularizers, and more layers than there are up to the block."""
        yield from super().problems(facts)
        if isinstance(self.block_index, int) and self.layers is not None and self.layers > self.block_index + 1:
            count = self.block_index + 1
            yield "layers", f"there are {count} blocks up to block_index {count - 1}: layers must be 1 to {count}"


class ProjectedTeacherSettings(TwoBlockSettings):
    """The settings of methods in which a later block of another model teaches an earlier one."""

    projector: ProjectorSection = ProjectorSettings()
    """The map from the student's tokens to the teacher's."""

    def overhead(self, sizes: Sizes) -> Overhead:
        """Return the projector."""
        (tap,) = sizes.taps
        return self.projector.overhead(tap.dim, tap.dim, tap.number)


@regularizer("self_transcendence", f"{_METHODS}.self_transcendence:SelfTranscendence")
class SelfTranscendenceSettings(ProjectedTeacherSettings):
    """Self-Transcendence (2601.07773): an earlier, guided model of the same kind teaches a block of the new one."""

    type: Literal["self_transcendence"] = "self_transcendence"
    weights: LocalFile | None = None
    """The teacher's `model.safetensors`, from `repa-lab export`; null is the pretrained model before its first step."""
    guidance: Annotated[float, Field(ge=0)] = 30.0
    """Scale of classifier-free guidance of the teacher's tokens; 1 is none, and saves a pass."""
    low: Fraction = 0.4
    """Images below this time are left out; 0 is data, 1 is noise."""
    high: Fraction = 0.7
    """Images above this time are left out."""
    loss: Literal["cosine", "mse"] = later("cosine")
    """Minus the cosine of tokens, or their mean squared error, which is SimpleTuner's."""

    def needs(self) -> Needs:
        """Return the student's block and the block of the frozen teacher."""
        frozen = FrozenModel(self.weights, self.guidance)
        return Needs(taps=(self.block_index,), frozen_taps=(self.teacher_block,), frozen=frozen)

    def problems(self, facts: TrainingFacts) -> Iterator[tuple[str, str]]:
        """Yield the problems of two blocks, a teacher that was never trained, and an empty range of times."""
        yield from super().problems(facts)
        if self.weights is None and not facts.is_pretrained:
            advice = "train one, and name its model.safetensors (repa-lab export)"
            yield "weights", f"before its first step a denoiser from scratch has learned nothing to teach: {advice}"
        if self.low > self.high:
            yield "low", f"low must not be above high, got {self.low} and {self.high}"


class AveragedTeacherSettings(ProjectedTeacherSettings):
    """The settings of methods in which a later block of the averaged model teaches an earlier block."""

    teacher_block: BlockIndex | None = None
    """The averaged model's block that teaches, 0-based, after `block_index`; null is at two thirds of the depth."""

    teacher_depth: ClassVar[float] = 2 / 3


@regularizer("sra", f"{_METHODS}.sra:SRA")
class SRASettings(AveragedTeacherSettings):
    """SRA (2505.02831): a later block of the averaged model, which sees less noise, teaches an earlier block."""

    type: Literal["sra"] = "sra"
    weight: NotNegative = 0.2
    """Lambda: the weight after warm-up. At 0 nothing is computed."""
    less_noise: Fraction = 0.2
    """The teacher's time is lower than the student's by up to this much, drawn uniformly for each image."""
    loss: Literal["smooth_l1", "cosine"] = "smooth_l1"
    """The paper's smooth L1 loss, or minus the cosine as in the later code, which has weight 0.5."""
    beta: Annotated[float, Field(gt=0), UsedIf("loss", ("smooth_l1",))] = 0.05
    """Error at which `smooth_l1` turns from squared to absolute."""

    def needs(self) -> Needs:
        """Return the student's block, and the averaged model's at less noise."""
        return Needs(taps=(self.block_index,), ema_taps=(self.teacher_block,), less_noise=self.less_noise)


@regularizer("self_flow", f"{_METHODS}.self_flow:SelfFlow")
class SelfFlowSettings(AveragedTeacherSettings):
    """Self-Flow (2603.06507): the denoiser sees two noise levels in an image, its averaged teacher the lower one."""

    type: Literal["self_flow"] = "self_flow"
    mask_ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of an image's tokens at the second time. Both times are drawn alike, so more than half is no other case."""

    def needs(self) -> Needs:
        """Return the student's block, the averaged model's, and the share of tokens at a second time."""
        return Needs(taps=(self.block_index,), ema_taps=(self.teacher_block,), token_times=self.mask_ratio)
