"""Tokens of clips, frame by frame, and CREPA against its formula in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.align import Loss, Projector, ProjectorSettings, Shapes, Signals, Tokens, normalise_over_space
from repa_lab.align.methods.crepa import frame_weights, weighted_similarity
from repa_lab.align.methods.sra2 import latents_of_tokens
from repa_lab.align.needs import TrainingFacts
from repa_lab.align.regularizer import Pair
from repa_lab.align.settings import REGULARIZERS
from tests.align.test_methods import WIDTH, build, cosines, draw, linear, numpy, problems
from tests.rounding import COSINE, REGULARIZER


class TestClips:
    """Tokens of a clip: every frame is what an image of its own would be."""

    def clips(self) -> Tokens:
        return Tokens(torch.randn(2, 3 * 8, 5), (2, 4), 3)

    def frames(self, clips: Tokens) -> list[Tokens]:
        return [Tokens(values, clips.grid) for values in clips.values.unflatten(1, (clips.frames, -1)).unbind(1)]

    def test_frames_as_images_and_back(self):
        clips = self.clips()
        images = clips.as_images()
        assert (images.values.shape, images.frames) == ((6, 8, 5), 1)
        assert torch.equal(images.values[4], clips.values[1, 8:16])  # the second frame of the second clip
        assert torch.equal(images.as_clips(3).values, clips.values)
        one = Tokens(torch.randn(2, 8, 5), (2, 4))
        assert one.as_images() is one
        assert one.as_clips(1) is one

    def test_every_frame_is_resampled_normalised_and_averaged_alone(self):
        clips = self.clips()
        for whole, each in (
            (clips.resample((3, 3)), [frame.resample((3, 3)) for frame in self.frames(clips)]),
            (normalise_over_space(clips, 0.6), [normalise_over_space(frame, 0.6) for frame in self.frames(clips)]),
            (clips.mean(), [frame.mean() for frame in self.frames(clips)]),
        ):
            assert (whole.frames, whole.grid) == (3, each[0].grid)
            torch.testing.assert_close(whole.values, torch.cat([frame.values for frame in each], dim=1))

    def test_no_convolution_reaches_another_frame(self):
        clips, projector = self.clips(), Projector(5, 4, ProjectorSettings(type="conv"))
        other = Tokens(torch.cat([clips.values[:, :16], torch.randn(2, 8, 5)], dim=1), (2, 4), 3)
        before, after = projector(clips).values, projector(other).values
        assert torch.equal(before[:, :16], after[:, :16])
        assert not torch.equal(before[:, 16:], after[:, 16:])

    def test_a_token_has_the_latents_of_its_cells_in_its_own_frame(self):
        latents = torch.arange(2 * 3 * 4 * 6.0).view(1, 2, 3, 4, 6)
        found = latents_of_tokens(latents, (2, 3))
        assert (found.frames, found.values.shape) == (3, (1, 18, 8))
        # Token 4 of the second frame is in the second row, second column: cells 2..3 by 2..3 of both channels.
        own = [*latents[0, 0, 1, 2:4, 2:4].flatten(), *latents[0, 1, 1, 2:4, 2:4].flatten()]
        assert found.values[0, 6 + 4].tolist() == own

    def test_a_wrong_number_of_tokens_is_refused(self):
        with pytest.raises(ValueError, match="16 tokens do not fill the grid 2x4 of 3 frames"):
            Tokens(torch.randn(1, 16, 5), (2, 4), 3)


class TestCREPA:
    SHAPES = Shapes((WIDTH,), (5,))
    FRAMES = 4

    def clips(self, seed: int = 0, width: int = WIDTH, frames: int = FRAMES, grid: tuple[int, int] = (2, 3)) -> Tokens:
        count = frames * grid[0] * grid[1]
        return Tokens(draw(2, count, width, seed=seed).requires_grad_(), grid, frames)

    def loss(self, student: Tokens, teacher: Tokens, **settings) -> Loss:
        regularizer = build("crepa", self.SHAPES, projector="linear", **settings)
        return regularizer(Signals(taps=(student,), encoders=(teacher,)))

    def by_hand(self, student: Tokens, teacher: Tokens, neighbours, tau: float, *, per_weight=False) -> np.ndarray:
        """The sum of each clip and frame ``(B, frames)``, from the formula, one pair of frames at a time."""
        projector = build("crepa", self.SHAPES, projector="linear").projectors[0]
        h = linear(projector, numpy(student.values)).reshape(2, self.FRAMES, 6, 5)
        y = numpy(teacher.values).reshape(2, self.FRAMES, 6, 5)
        sums = np.zeros((2, self.FRAMES))
        for frame in range(self.FRAMES):
            others = [other for other in neighbours(frame) if 0 <= other < self.FRAMES]
            weights = [1.0, *(np.exp(-abs(other - frame) / tau) for other in others)]
            for other, weight in zip((frame, *others), weights, strict=True):
                sums[:, frame] += weight * cosines(h[:, frame], y[:, other]).mean(-1)
            sums[:, frame] /= sum(weights) if per_weight else 1
        return sums

    @pytest.mark.parametrize("distance", [1, 2])
    def test_the_formula(self, distance):
        student, teacher = self.clips(), self.clips(1, width=5)
        found = self.loss(student, teacher, distance=distance, tau=1.5)
        sums = self.by_hand(student, teacher, lambda f: (f - distance, f + distance), 1.5)
        assert found.value.item() == pytest.approx(-sums.mean(), rel=REGULARIZER)
        assert found.parts["similarity"].item() == pytest.approx(sums.mean(), rel=REGULARIZER)
        own = self.by_hand(student, teacher, lambda f: (), 1.5)
        assert found.parts["cosine"].item() == pytest.approx(own.mean(), rel=REGULARIZER)

    def test_every_neighbour_up_to_the_distance(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        found = self.loss(student, teacher, distance=2, cumulative=True)
        sums = self.by_hand(student, teacher, lambda f: (f - 2, f - 1, f + 1, f + 2), 1.0)
        assert found.value.item() == pytest.approx(-sums.mean(), rel=REGULARIZER)

    def test_the_sum_over_frames_is_the_papers(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        found = self.loss(student, teacher, normalize_frames=False)
        sums = self.by_hand(student, teacher, lambda f: (f - 1, f + 1), 1.0)
        assert found.value.item() == pytest.approx(-sums.sum(1).mean(), rel=REGULARIZER)

    def test_weights_that_add_up_to_one(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        found = self.loss(student, teacher, distance=2, tau=0.7, cumulative=True, normalize_neighbours=True)
        sums = self.by_hand(student, teacher, lambda f: (f - 2, f - 1, f + 1, f + 2), 0.7, per_weight=True)
        assert found.value.item() == pytest.approx(-sums.mean(), rel=REGULARIZER)

    def test_three_equal_frames_by_hand(self):
        settings = REGULARIZERS["crepa"].settings()
        weights = frame_weights(settings, 3, torch.device("cpu"))
        equal = draw(1, 6, 5).repeat(1, 3, 1)
        # With one neighbour 1 + exp(-1), with two 1 + 2 exp(-1).
        assert weights.sum(1).tolist() == pytest.approx([1.367879, 1.735759, 1.367879], abs=COSINE)
        expected = (2 * 1.3678794 + 1.7357589) / 3
        assert weighted_similarity(Pair(equal, equal), weights).item() == pytest.approx(expected, abs=COSINE)

    def test_without_neighbours_it_is_repa_frame_by_frame(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        images = Signals(taps=(student.as_images(),), encoders=(teacher.as_images(),))
        expected = build("repa", self.SHAPES, projector="linear")(images).value.item()
        assert self.loss(student, teacher, distance=0).value.item() == pytest.approx(expected, rel=COSINE)

    def test_backwards_in_time_it_is_the_same(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        turned = (
            Tokens(one.values.unflatten(1, (self.FRAMES, 6)).flip(1).flatten(1, 2), one.grid, self.FRAMES)
            for one in (student, teacher)
        )
        expected = self.loss(student, teacher, distance=2, cumulative=True).value.item()
        assert self.loss(*turned, distance=2, cumulative=True).value.item() == pytest.approx(expected, rel=COSINE)

    def test_the_gradient_is_that_of_the_formula(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        regularizer = build("crepa", self.SHAPES, projector="linear", distance=1).double()
        projected = regularizer.projectors[0](Tokens(student.values.detach().double(), (2, 3), self.FRAMES))
        leaf = projected.values.detach().requires_grad_()
        weights = frame_weights(regularizer.settings, self.FRAMES, torch.device("cpu"))
        weighted_similarity(Pair(leaf.float(), teacher.values), weights).backward()
        h, y = leaf.detach().numpy().reshape(2, self.FRAMES, 6, 5), numpy(teacher.values).reshape(2, self.FRAMES, 6, 5)
        unit, wanted = y / np.linalg.norm(y, axis=-1, keepdims=True), np.zeros_like(h)
        for frame in range(self.FRAMES):
            toward = unit[:, frame].copy()
            for other in (frame - 1, frame + 1):
                toward += np.exp(-1) * unit[:, other] if 0 <= other < self.FRAMES else 0
            length = np.linalg.norm(h[:, frame], axis=-1, keepdims=True)
            along = h[:, frame] / length
            wanted[:, frame] = (toward - (toward * along).sum(-1, keepdims=True) * along) / length
        wanted /= 2 * self.FRAMES * 6
        np.testing.assert_allclose(leaf.grad.numpy(), wanted.reshape(2, -1, 5), rtol=1e-4, atol=1e-7)
        assert teacher.values.grad is None

    def test_a_change_of_the_teachers_next_frame_moves_only_its_neighbours(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        other = teacher.values.detach().clone()
        other[:, 18:] = draw(2, 6, 5, seed=9)  # the last of four frames
        gradients = []
        for values in (teacher.values.detach(), other):
            (gradient,) = torch.autograd.grad(self.loss(student, Tokens(values, (2, 3), 4)).value, student.values)
            gradients.append(gradient.unflatten(1, (self.FRAMES, 6)))
        changed = (gradients[0] - gradients[1]).abs().amax((0, 2, 3)) > 1e-6
        assert changed.tolist() == [False, False, True, True]

    def test_means_of_every_frame(self):
        student, teacher = self.clips(), self.clips(1, width=5)
        found = self.loss(student, teacher, distance=0, spatial_align=False)
        projector = build("crepa", self.SHAPES, projector="linear").projectors[0]
        h = linear(projector, numpy(student.values)).reshape(2, self.FRAMES, 6, 5).mean(2)
        y = numpy(teacher.values).reshape(2, self.FRAMES, 6, 5).mean(2)
        assert found.value.item() == pytest.approx(-cosines(h, y).mean(), rel=REGULARIZER)

    def test_half_precision_is_computed_in_float32(self):
        pair = Pair(self.clips(width=5).values.detach().bfloat16(), self.clips(1, width=5).values.detach())
        weights = frame_weights(REGULARIZERS["crepa"].settings(), self.FRAMES, torch.device("cpu"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = weighted_similarity(pair, weights)
        assert torch.equal(found, weighted_similarity(Pair(pair.student.float(), pair.teacher), weights))

    def test_other_numbers_of_frames_are_refused(self):
        with pytest.raises(ValueError, match="the block has 4 frames and the encoder 3"):
            self.loss(self.clips(), self.clips(1, width=5, frames=3))

    def test_images_and_distances_beyond_the_clip_are_refused(self):
        ((field, message),) = problems("crepa")
        assert (field, message) == (
            "type",
            "crepa compares the frames of clips, and the data have one frame each: use repa",
        )
        clips = TrainingFacts(12, 4, True, frames=3)
        ((field, message),) = problems("crepa", clips, distance=3)
        assert field == "distance"
        assert message == "a clip has 3 frames in the denoiser: distance must be 0 to 2, got 3"
        assert problems("crepa", clips, distance=2) == []
