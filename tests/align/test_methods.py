"""Every method against its formula in NumPy float64, and where its gradients go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from repa_lab.align import Loss, Prediction, Regularizer, Shapes, Signals, Tokens
from repa_lab.align.methods.haste import attention_loss
from repa_lab.align.methods.sra2 import latents_of_tokens
from repa_lab.align.needs import Needs, Sizes, TokenSize, TrainingFacts
from repa_lab.align.regularizer import Attention
from repa_lab.align.settings import REGULARIZERS
from tests.rounding import COSINE, REGULARIZER

GRID, WIDTH = (4, 4), 6
FACTS = TrainingFacts(depth=12, images=4, is_pretrained=False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0, width: int = WIDTH, grid: tuple[int, int] = GRID, images: int = 3) -> Tokens:
    return Tokens(draw(images, grid[0] * grid[1], width, seed=seed).requires_grad_(), grid)


def build(kind: str, shapes: Shapes, **settings) -> Regularizer:
    component = REGULARIZERS[kind]
    chosen = component.settings.model_validate({"type": kind, **settings}).resolved(1, 10, 12)
    torch.manual_seed(3)
    return component.load()(chosen, shapes)


def needs(kind: str, **settings) -> Needs:
    component = REGULARIZERS[kind]
    return component.needs(component.settings.model_validate({"type": kind, **settings}).resolved(3, 10, 12))


def problems(kind: str, facts: TrainingFacts = FACTS, block: int = 3, **settings) -> list[tuple[str, str]]:
    chosen = REGULARIZERS[kind].settings.model_validate({"type": kind, **settings})
    return list(chosen.resolved(block, 10, facts.depth or 12).problems(facts))


def numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().numpy()


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(-1) / (np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1))


def linear(projector: nn.Module, values: np.ndarray) -> np.ndarray:
    """SimpleTuner's LayerNorm + Linear, by hand."""
    norm, layer = projector.net["layers"]
    mean, var = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
    normed = (values - mean) / np.sqrt(var + norm.eps) * numpy(norm.weight) + numpy(norm.bias)
    return normed @ numpy(layer.weight).T + numpy(layer.bias)


class TestDispersive:
    SHAPES = Shapes((WIDTH,))

    def loss(self, student: Tokens, **settings) -> Loss:
        return build("dispersive", self.SHAPES, **settings)(Signals(taps=(student,)))

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_infonce_over_squared_distances(self, temperature):
        student = tokens()
        z = numpy(student.values).reshape(3, -1)
        apart = ((z[:, None] - z[None]) ** 2).sum(-1) / z.shape[1]
        expected = np.log(np.exp(-apart / temperature).mean())  # all 9 pairs, the diagonal too
        found = self.loss(student, temperature=temperature)
        assert found.value.item() == pytest.approx(expected, rel=REGULARIZER)
        assert found.parts["distance"].item() == pytest.approx(apart.sum() / 6, rel=REGULARIZER)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_infonce_over_cosines(self, temperature):
        student = tokens()
        z = numpy(student.values).reshape(3, -1)
        similar = cosines(z[:, None], z[None])
        expected = np.log(np.exp(similar / temperature).mean())
        assert self.loss(student, loss="infonce_cosine", temperature=temperature).value.item() == pytest.approx(
            expected, rel=REGULARIZER
        )

    def test_hinge(self):
        student = tokens()
        z = numpy(student.values).reshape(3, -1)
        apart = ((z[:, None] - z[None]) ** 2).sum(-1) / z.shape[1]
        off = apart[~np.eye(3, dtype=bool)]
        for margin in (1.0, 2.0):
            expected = (np.maximum(0, margin - off) ** 2).mean()
            assert self.loss(student, loss="hinge", margin=margin).value.item() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("loss", ["infonce_l2", "infonce_cosine", "hinge"])
    def test_a_step_down_the_gradient_drives_two_images_apart(self, loss):
        one = draw(1, 16, WIDTH)
        student = Tokens(torch.cat([one, one + 0.1 * draw(1, 16, WIDTH, seed=1)]).requires_grad_(), GRID)
        before = self.loss(student, loss=loss)
        (gradient,) = torch.autograd.grad(before.value, student.values)
        after = self.loss(Tokens(student.values - gradient, GRID), loss=loss)
        assert after.parts["distance"] > before.parts["distance"]
        if loss != "infonce_cosine":  # whose gradients are orthogonal to the images
            torch.testing.assert_close(gradient[0], -gradient[1], rtol=1e-3, atol=1e-6)

    def test_equal_images_have_a_finite_gradient(self):
        student = Tokens(draw(1, 16, WIDTH).expand(3, -1, -1).clone().requires_grad_(), GRID)
        value = self.loss(student).value
        assert value.item() == pytest.approx(0, abs=COSINE)  # log 1, the most that it can be
        (gradient,) = torch.autograd.grad(value, student.values)
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_half_precision_is_computed_in_float32(self):
        student = tokens()
        half = Tokens(student.values.detach().bfloat16(), GRID)
        assert torch.equal(self.loss(half).value, self.loss(Tokens(half.values.float(), GRID)).value)

    def test_one_image_is_refused(self):
        with pytest.raises(ValueError, match="there is a single one"):
            self.loss(tokens(images=1))
        assert [field for field, _ in problems("dispersive", TrainingFacts(12, 1, False))] == ["type"]
        assert problems("dispersive", TrainingFacts(12, 2, False)) == []


class TestLayerSync:
    SHAPES = Shapes((WIDTH, WIDTH))

    def test_the_formula(self):
        student, teacher = tokens(), tokens(1)
        found = build("layersync", self.SHAPES)(Signals(taps=(student, teacher)))
        expected = cosines(numpy(student.values), numpy(teacher.values)).mean()
        assert found.value.item() == pytest.approx(-expected, rel=REGULARIZER)
        assert found.parts["cosine"].item() == pytest.approx(expected, rel=REGULARIZER)

    def test_no_gradient_reaches_the_teacher(self):
        student, teacher = tokens(), tokens(1)
        build("layersync", self.SHAPES)(Signals(taps=(student, teacher))).value.backward()
        assert student.values.grad.abs().min() > 0
        assert teacher.values.grad is None

    def test_a_smaller_grid_is_resampled(self):
        student, teacher = tokens(), Tokens(torch.ones(3, 4, WIDTH), (2, 2))
        found = build("layersync", self.SHAPES)(Signals(taps=(student, teacher)))
        expected = cosines(numpy(student.values), np.ones(WIDTH)).mean()
        assert found.value.item() == pytest.approx(-expected, rel=REGULARIZER)

    def test_it_trains_nothing_of_its_own(self):
        assert list(build("layersync", self.SHAPES).parameters()) == []

    @pytest.mark.parametrize(("depth", "student", "teacher"), [(28, 7, 15), (24, 7, 13), (12, 3, 6), (4, 1, 2)])
    def test_the_suggested_teacher(self, depth, student, teacher):
        settings = REGULARIZERS["layersync"].settings().resolved(student, 10, depth)
        assert settings.needs().taps == (student, teacher)

    def test_blocks_in_the_wrong_order_are_refused(self):
        for teacher in (2, 3):
            ((field, message),) = problems("layersync", block_index=3, teacher_block=teacher)
            assert field == "teacher_block"
            assert message == f"the teacher must come after the student: block_index is 3, teacher_block {teacher}"
        assert problems("layersync", teacher_block=2) != []  # after the suggested 3
        assert problems("layersync", block_index=3, teacher_block=4) == []


class TestSRA2:
    SHAPES = Shapes((WIDTH,), strides=(2,), latents=4)

    def signals(self, latents: torch.Tensor, error: float = 0.5) -> Signals:
        prediction = Prediction(torch.full((3, 4, 8, 8), error), torch.zeros(3, 4, 8, 8))
        return Signals(taps=(tokens(),), latents=latents, prediction=prediction)

    def test_a_token_has_the_latents_of_its_cells(self):
        latents = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
        found = latents_of_tokens(latents, (2, 3))
        assert found.grid == (2, 3)
        # Token 4 is in the second row, second column: cells 2..3 by 2..3 of both channels.
        assert found.values[0, 4].tolist() == [*latents[0, 0, 2:4, 2:4].flatten(), *latents[0, 1, 2:4, 2:4].flatten()]
        with pytest.raises(ValueError, match="a grid of 3x3 tokens does not divide latents of 4x6"):
            latents_of_tokens(latents, (3, 3))

    @pytest.mark.parametrize("normalize", [True, False])
    def test_the_formula(self, normalize):
        latents = 60 * draw(3, 4, 8, 8, seed=2) + 7
        regularizer = build("sra2", self.SHAPES, normalize=normalize, projector="linear")
        signals = self.signals(latents)
        found = regularizer(signals)
        z = numpy(latents)
        if normalize:
            z = (z - z.mean((1, 2, 3), keepdims=True)) / z.std((1, 2, 3), keepdims=True)
        z = z.reshape(3, 4, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(3, 16, 16)
        off = np.abs(linear(regularizer.projector, numpy(signals.taps[0].values)) - z)
        expected = np.where(off < 0.05, off**2 / 0.1, off - 0.025).mean()
        assert found.value.item() == pytest.approx(expected, rel=REGULARIZER)
        assert found.parts["ratio"].item() == pytest.approx(expected / 0.25, rel=REGULARIZER)

    def test_normalized_the_scale_of_the_latents_does_not_matter(self):
        latents = draw(3, 4, 8, 8, seed=2)
        regularizer = build("sra2", self.SHAPES)
        small, large = (regularizer(self.signals(scale * latents + 3)).value for scale in (1.0, 1000.0))
        assert small.item() == pytest.approx(large.item(), rel=1e-4)
        raw = build("sra2", self.SHAPES, normalize=False)
        assert raw(self.signals(1000 * latents)).value > 100 * raw(self.signals(latents)).value

    def test_flat_latents_are_finite(self):
        assert build("sra2", self.SHAPES)(self.signals(torch.full((3, 4, 8, 8), 2.0))).value.isfinite()

    def test_gradients_reach_the_tap_and_the_projector_but_not_the_prediction(self):
        signals = self.signals(draw(3, 4, 8, 8))
        output = signals.prediction.output.requires_grad_()
        regularizer = build("sra2", self.SHAPES)
        regularizer(signals).value.backward()
        assert signals.taps[0].values.grad.abs().max() > 0
        assert all(parameter.grad is not None for parameter in regularizer.parameters())
        assert output.grad is None

    def test_the_projector_costs_what_it_is(self):
        settings = REGULARIZERS["sra2"].settings()
        overhead = settings.overhead(Sizes((TokenSize(WIDTH, 16),), (), TokenSize(4, 64)))
        assert overhead.parameters == sum(one.numel() for one in build("sra2", self.SHAPES).parameters())


class TestRelation:
    SHAPES = Shapes((WIDTH,), (5,))

    def test_the_formula_of_trd(self):
        regularizer = build("relation", self.SHAPES, projector="linear")
        student, teacher = tokens(), tokens(1, width=5)
        found = regularizer(Signals(taps=(student,), encoders=(teacher,)))
        s, y = linear(regularizer.projectors[0], numpy(student.values)), numpy(teacher.values)
        difference = cosines(s[:, :, None], s[:, None]) - cosines(y[:, :, None], y[:, None])
        expected = np.maximum(0, np.abs(difference) - 0.1).mean()
        assert found.value.item() == pytest.approx(expected, rel=REGULARIZER)
        assert found.parts["relation"].item() == found.value.item()

    def test_a_rotation_of_the_teacher_changes_nothing(self):
        rotation = torch.linalg.qr(draw(5, 5, seed=4))[0]
        regularizer, student, teacher = build("relation", self.SHAPES), tokens(), tokens(1, width=5)
        straight, turned = (
            regularizer(Signals(taps=(student,), encoders=(Tokens(values, GRID),))).value.item()
            for values in (teacher.values, teacher.values @ rotation)
        )
        assert straight == pytest.approx(turned, rel=1e-4)

    def test_within_the_margin_there_is_no_gradient(self):
        student = tokens()
        regularizer = build("relation", self.SHAPES, relation={"distance": "l1_margin", "margin": 2.0})
        regularizer(Signals(taps=(student,), encoders=(tokens(1, width=5),))).value.backward()
        assert torch.equal(student.values.grad, torch.zeros_like(student.values))

    def test_a_single_token_is_refused(self):
        with pytest.raises(ValueError, match="there is a single token"):
            build("relation", self.SHAPES)(
                Signals(taps=(tokens(grid=(1, 1)),), encoders=(tokens(1, width=5, grid=(1, 1)),))
            )


class TestHASTE:
    SHAPES = Shapes((WIDTH,), (5,))

    def heads(self, count: int, seed: int, grid: tuple[int, int] = GRID) -> Attention:
        query, key = draw(2, 3, count, grid[0] * grid[1], 4, seed=seed).requires_grad_().unbind()
        return Attention(query, key, grid)

    def signals(self, student: list[Attention], teacher: list[Attention]) -> Signals:
        return Signals((tokens(),), (tokens(1, width=5),), attention=(*student,), encoder_attention=((*teacher,),))

    def test_the_formula(self):
        student, teacher = [self.heads(3, seed) for seed in (1, 2)], [self.heads(2, seed) for seed in (3, 4)]
        regularizer = build("haste", self.SHAPES, projector="linear", attention_weight=3.0)
        signals = self.signals(student, teacher)
        found = regularizer(signals)

        def softmax(heads: Attention) -> np.ndarray:
            products = np.exp(numpy(heads.query)[:, :2] @ numpy(heads.key)[:, :2].swapaxes(2, 3) / 2)
            return products / products.sum(-1, keepdims=True)

        layers = [-(softmax(t) * np.log(softmax(s))).sum(-1).mean() for s, t in zip(student, teacher, strict=True)]
        s = linear(regularizer.projectors[0], numpy(signals.taps[0].values))
        cosine = cosines(s, numpy(signals.encoders[0].values)).mean()
        assert found.value.item() == pytest.approx(-cosine + 3 * np.mean(layers), rel=REGULARIZER)
        assert found.parts["attention"].item() == pytest.approx(np.mean(layers), rel=REGULARIZER)
        assert found.parts["cosine"].item() == pytest.approx(cosine, rel=REGULARIZER)

    def test_gradients_reach_the_heads_that_are_compared_and_no_teacher(self):
        student, teacher = self.heads(3, 1), self.heads(2, 2)
        leaves = [heads.detach().clone().requires_grad_() for heads in (*student[:2], *teacher[:2])]
        query, key, *theirs = leaves
        attention_loss(Attention(query, key, GRID), Attention(*theirs, GRID)).backward()
        for own in (query, key):
            assert (own.grad.abs().amax((0, 2, 3)) > 0).tolist() == [True, True, False]
        assert all(one.grad is None for one in theirs)

    def test_the_teachers_own_attention_is_the_least(self):
        teacher = self.heads(2, 1)
        query = teacher.query.detach().clone().requires_grad_()
        least = attention_loss(Attention(query, teacher.key.detach(), GRID), teacher)
        p = teacher.logits().softmax(-1)
        assert least.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=REGULARIZER)  # its entropy
        (gradient,) = torch.autograd.grad(least, query)
        assert gradient.abs().max() < 1e-7
        assert attention_loss(self.heads(2, 2), teacher) > least

    def test_other_grids_are_resampled(self):
        assert attention_loss(self.heads(2, 1), self.heads(2, 2)) == attention_loss(
            self.heads(2, 1), self.heads(2, 2).resample(GRID)
        )
        one_key = self.heads(2, 2, (1, 1))  # every query sees the same: the same attention to all
        uniform = attention_loss(self.heads(2, 1), one_key)
        logs = self.heads(2, 1).logits().log_softmax(-1)
        assert uniform.item() == pytest.approx(-logs.mean().item(), rel=REGULARIZER)

    def test_what_it_needs(self):
        asked = needs("haste")
        assert (asked.taps, asked.attention, asked.encoder_attention) == ((3,), (0, 1, 2, 3), (-4, -3, -2, -1))
        asked = needs("haste", layers=2)
        assert (asked.attention, asked.encoder_attention) == ((2, 3), (-2, -1))
        asked = needs("haste", attention_weight=0.0)
        assert (asked.attention, asked.encoder_attention) == ((), ())
        settings = REGULARIZERS["haste"].settings
        assert settings(block_index=7).resolved(3, 10, 28).needs().attention == (4, 5, 6, 7)
        assert settings(block_index=1).resolved(3, 10, 28).needs().attention == (0, 1)

    def test_without_attention_it_is_repa(self):
        signals = Signals((tokens(),), (tokens(1, width=5),))
        repa, haste = build("repa", self.SHAPES), build("haste", self.SHAPES, attention_weight=0.0)
        assert torch.equal(repa(signals).value, haste(signals).value)
        assert haste(signals).parts.keys() == {"cosine"}

    def test_more_layers_than_there_are_is_refused(self):
        ((field, message),) = problems("haste", layers=5)
        assert field == "layers"
        assert message == "there are 4 blocks up to block_index 3: layers must be 1 to 4"

    def test_the_products_cost_what_they_are(self):
        sizes = Sizes((TokenSize(8, 16),), (TokenSize(6, 16),), TokenSize(4, 64))
        settings = REGULARIZERS["haste"].settings(layers=2, projector="linear").resolved(3, 10, 12)
        found = settings.overhead(sizes)
        assert found.macs == 16 * 8 * 6 + 2 * 16**2 * (8 + 6 / 3)


class TestSelfTranscendence:
    SHAPES = Shapes((WIDTH,), frozen_taps=(5,))
    TIMES = torch.tensor([0.39, 0.4, 0.7])

    def test_the_formula(self):
        regularizer = build("self_transcendence", self.SHAPES, projector="linear")
        student, teacher = tokens(), tokens(1, width=5)
        found = regularizer(Signals(taps=(student,), frozen_taps=(teacher,), times=self.TIMES))
        s = linear(regularizer.projector, numpy(student.values))
        cosine = cosines(s, numpy(teacher.values)).mean(1)
        assert found.value.item() == pytest.approx(
            -cosine[1:].sum() / 3, rel=REGULARIZER
        )  # the first image is out of range
        assert found.parts["cosine"].item() == pytest.approx(cosine.mean(), rel=REGULARIZER)

    def test_the_squared_error(self):
        regularizer = build("self_transcendence", self.SHAPES, projector="linear", loss="mse")
        student, teacher = tokens(), tokens(1, width=5)
        found = regularizer(Signals(taps=(student,), frozen_taps=(teacher,), times=self.TIMES))
        off = linear(regularizer.projector, numpy(student.values)) - numpy(teacher.values)
        assert found.value.item() == pytest.approx((off[1:] ** 2).mean((1, 2)).sum() / 3, rel=REGULARIZER)
        found.value.backward()
        assert teacher.values.grad is None

    def test_tokens_with_times_of_their_own_are_judged_by_them(self):
        student, teacher = tokens(), tokens(1, width=5)
        regularizer = build("self_transcendence", self.SHAPES, projector="linear")
        times = torch.rand((3, 1, *GRID), generator=torch.Generator().manual_seed(2))
        found = regularizer(Signals(taps=(student,), frozen_taps=(teacher,), times=times))
        t = numpy(times).reshape(3, 16)
        cosine = cosines(linear(regularizer.projector, numpy(student.values)), numpy(teacher.values))
        assert found.value.item() == pytest.approx(
            -np.where((t >= 0.4) & (t <= 0.7), cosine, 0).mean(), rel=REGULARIZER
        )

    def test_images_out_of_range_and_the_teacher_get_no_gradient(self):
        student, teacher = tokens(), tokens(1, width=5)
        build("self_transcendence", self.SHAPES)(
            Signals(taps=(student,), frozen_taps=(teacher,), times=self.TIMES)
        ).value.backward()
        reached = student.values.grad.abs().amax((1, 2)) > 0
        assert reached.tolist() == [False, True, True]
        assert teacher.values.grad is None

    def test_what_it_needs(self):
        asked = needs("self_transcendence", weights="model.safetensors", guidance=4.0)
        assert (asked.taps, asked.frozen_taps) == ((3,), (6,))
        assert (asked.frozen.weights, asked.frozen.guidance, asked.extra_passes) == ("model.safetensors", 4.0, 2)
        assert needs("self_transcendence", guidance=1.0).extra_passes == 1

    def test_a_teacher_that_learned_nothing_is_refused(self):
        ((field, message),) = problems("self_transcendence")
        assert field == "weights"
        assert message.startswith("before its first step a denoiser from scratch has learned nothing to teach")
        assert problems("self_transcendence", TrainingFacts(12, 4, True)) == []
        assert problems("self_transcendence", weights="model.safetensors") == []
        ((field, _),) = problems("self_transcendence", TrainingFacts(12, 4, True), low=0.8)
        assert field == "low"


class TestSRA:
    SHAPES = Shapes((WIDTH,), ema_taps=(5,))

    def test_the_formula(self):
        regularizer = build("sra", self.SHAPES, projector="linear", beta=0.4)
        student, teacher = tokens(), tokens(1, width=5)
        found = regularizer(Signals(taps=(student,), ema_taps=(teacher,)))
        s, g = linear(regularizer.projector, numpy(student.values)), numpy(teacher.values)
        off = np.abs(s - g)
        assert (off < 0.4).any()
        expected = np.where(off < 0.4, off**2 / 0.8, off - 0.2).mean()
        assert found.value.item() == pytest.approx(expected, rel=REGULARIZER)
        assert found.parts["cosine"].item() == pytest.approx(cosines(s, g).mean(), rel=REGULARIZER)

    def test_the_cosine_is_over_the_channels(self):
        regularizer = build("sra", self.SHAPES, projector="linear", loss="cosine")
        student, teacher = tokens(), tokens(1, width=5)
        found = regularizer(Signals(taps=(student,), ema_taps=(teacher,)))
        s, g = linear(regularizer.projector, numpy(student.values)), numpy(teacher.values)
        assert found.value.item() == pytest.approx(-cosines(s, g).mean(), rel=REGULARIZER)
        scaled = Tokens(
            teacher.values * torch.arange(1.0, 17).view(1, 16, 1), GRID
        )  # of every token, by another factor
        again = regularizer(Signals(taps=(student,), ema_taps=(scaled,)))
        assert again.value.item() == pytest.approx(found.value.item(), rel=REGULARIZER)

    @pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
    def test_gradients_reach_the_student_and_the_projector_but_not_the_teacher(self, loss):
        student, teacher = tokens(), tokens(1, width=5)
        regularizer = build("sra", self.SHAPES, loss=loss)
        regularizer(Signals(taps=(student,), ema_taps=(teacher,))).value.backward()
        assert student.values.grad.abs().amax((0, 2)).min() > 0
        assert all(parameter.grad.abs().max() > 0 for parameter in regularizer.parameters())
        assert teacher.values.grad is None

    def test_what_it_needs(self):
        asked = needs("sra", less_noise=0.3)
        assert (asked.taps, asked.ema_taps, asked.less_noise) == ((3,), (7,), 0.3)
        assert (asked.extra_passes, asked.token_times) == (1, 0.0)

    @pytest.mark.parametrize(("depth", "teacher"), [(28, 18), (24, 15), (12, 7)])
    def test_the_suggested_teacher(self, depth, teacher):
        assert REGULARIZERS["sra"].settings().resolved(3, 10, depth).needs().ema_taps == (teacher,)

    def test_blocks_in_the_wrong_order_are_refused(self):
        ((field, _),) = problems("sra", block_index=3, teacher_block=3)
        assert field == "teacher_block"
        assert problems("sra", schedule={"similarity_threshold": 0.5}) == []


class TestSelfFlow:
    SHAPES = Shapes((WIDTH,), ema_taps=(5,))

    def test_the_formula(self):
        regularizer = build("self_flow", self.SHAPES, projector="linear")
        student, teacher = tokens(), tokens(1, width=5)
        found = regularizer(Signals(taps=(student,), ema_taps=(teacher,)))
        expected = cosines(linear(regularizer.projector, numpy(student.values)), numpy(teacher.values)).mean()
        assert found.value.item() == pytest.approx(-expected, rel=REGULARIZER)
        assert found.parts["cosine"].item() == pytest.approx(expected, rel=REGULARIZER)

    def test_gradients_reach_the_student_and_the_projector_but_not_the_teacher(self):
        student, teacher = tokens(), tokens(1, width=5)
        regularizer = build("self_flow", self.SHAPES)
        regularizer(Signals(taps=(student,), ema_taps=(teacher,))).value.backward()
        assert student.values.grad.abs().amax((0, 2)).min() > 0
        assert all(parameter.grad.abs().max() > 0 for parameter in regularizer.parameters())
        assert teacher.values.grad is None

    def test_what_it_needs(self):
        asked = needs("self_flow", mask_ratio=0.5)
        assert (asked.taps, asked.ema_taps, asked.token_times) == ((3,), (7,), 0.5)
        assert (asked.extra_passes, asked.less_noise) == (1, 0.0)

    @pytest.mark.parametrize("ratio", [0.0, 0.6])
    def test_a_share_that_is_no_case_of_its_own_is_refused(self, ratio):
        with pytest.raises(ValueError, match="mask_ratio"):
            needs("self_flow", mask_ratio=ratio)

    def test_blocks_in_the_wrong_order_are_refused(self):
        ((field, _),) = problems("self_flow", block_index=3, teacher_block=2)
        assert field == "teacher_block"


@pytest.mark.parametrize("kind", ["dispersive", "sra2", "relation"])
def test_a_similarity_threshold_without_a_cosine_is_refused(kind):
    ((field, message),) = problems(kind, schedule={"similarity_threshold": 0.5})
    assert field == "schedule.similarity_threshold"
    assert message == f"{kind} measures no cosine of tokens that could reach a threshold: leave it out"
    assert problems("layersync", schedule={"similarity_threshold": 0.5}) == []
