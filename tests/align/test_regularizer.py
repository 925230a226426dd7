from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from repa_lab.align import REPA, UREPA, Loss, Shapes, Tokens
from repa_lab.align.regularizer import EncoderTarget
from repa_lab.align.settings import REPASettings, UREPASettings
from tests.align import references
from tests.align.references import align
from tests.rounding import COSINE, REGULARIZER, UNIT

GRID, SMALL = (3, 4), {"width": 8}


def tokens(dim: int, grid: tuple[int, int] = GRID, batch: int = 2) -> Tokens:
    return Tokens(torch.randn(batch, grid[0] * grid[1], dim), grid)


def projected(regularizer: REPA, student: Tokens) -> torch.Tensor:
    return regularizer.projectors[0](student).values.detach()


@pytest.mark.parametrize("weight", [0.5, 0.25, 2.0])
@pytest.mark.parametrize("turn, cosine", [("same", 1.0), ("opposite", -1.0), ("orthogonal", 0.0)])
def test_the_ends_of_the_scale(weight, turn, cosine):
    regularizer, student = REPA(6, 2, weight=weight, projector=SMALL), tokens(6)
    target = projected(regularizer, student)
    turned = {"same": target, "opposite": -target, "orthogonal": torch.stack([-target[..., 1], target[..., 0]], -1)}
    outcome = align(regularizer, student, Tokens(turned[turn], GRID))
    assert outcome.loss.item() == pytest.approx(-weight * cosine, abs=COSINE)
    assert outcome.cosine.item() == pytest.approx(cosine, abs=COSINE)
    assert (outcome.weight, outcome.manifold) == (weight, None)


def test_the_total_by_hand():
    """Teachers built so that every matching cosine is 0.5 and the mean squared Gram difference 0.1."""
    regularizer, student = (
        UREPA(6, 8, weight=0.5, manifold_weight=3.0, projector={"width": 16}),
        tokens(6, (1, 2), batch=1),
    )
    p = projected(regularizer, student)[0].double()
    p /= p.norm(dim=-1, keepdim=True)
    basis, _ = torch.linalg.qr(torch.cat([p.T, torch.randn(8, 2, dtype=torch.float64)], dim=1))
    u, v = basis[:, 2], basis[:, 3]
    close = p[0] @ p[1]
    difference = 0.2**0.5 if close < 0 else -(0.2**0.5)
    between = (close + difference - 0.25 * close) / 0.75
    first, second = u, between * u + (1 - between**2).sqrt() * v
    teacher = torch.stack([0.5 * p[0] + 0.75**0.5 * first, 0.5 * p[1] + 0.75**0.5 * second])
    outcome = align(regularizer, student, Tokens(teacher[None].float(), (1, 2)))
    assert outcome.cosine.item() == pytest.approx(0.5, abs=COSINE)
    assert outcome.manifold.item() == pytest.approx(0.1, abs=COSINE)
    assert outcome.loss.item() == pytest.approx(0.5 * (-0.5 + 3 * 0.1), abs=COSINE)


@pytest.mark.parametrize("weight, manifold_weight", [(0.5, 3.0), (0.5, 0.0), (0.0, 3.0), (1.5, 0.1)])
def test_the_total_is_weight_times_alignment_plus_manifold(weight, manifold_weight):
    regularizer, student, teacher = (
        UREPA(6, 5, weight=weight, manifold_weight=manifold_weight, projector=SMALL),
        tokens(6),
        tokens(5),
    )
    outcome = align(regularizer, student, teacher)
    p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
    alignment, manifold = references.alignment(p, t), references.manifold(p, t)
    assert outcome.loss.item() == pytest.approx(weight * (alignment + manifold_weight * manifold), abs=COSINE)
    assert outcome.cosine.item() == pytest.approx(-alignment, abs=COSINE)
    assert outcome.manifold.item() == pytest.approx(manifold, abs=COSINE)


def test_zero_is_a_number():
    student, teacher = tokens(6), tokens(5)
    without = UREPA(6, 5, weight=0.5, manifold_weight=0.0, projector=SMALL)
    repa = REPA(6, 5, weight=0.5, projector=SMALL)
    repa.load_state_dict(without.state_dict())
    assert torch.equal(align(without, student, teacher).loss, align(repa, student, teacher).loss)

    off = UREPA(6, 5, weight=0.0, manifold_weight=3.0, projector=SMALL)
    assert off.weight_at(0) == off.weight_at(10**6) == 0
    outcome = align(off, student, teacher)
    outcome.loss.backward()
    assert outcome.loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in off.parameters())


def test_the_student_is_projected_and_then_brought_to_the_encoders_grid():
    regularizer, student, teacher = UREPA(6, 5, projector=SMALL), tokens(6, (2, 3)), tokens(5, (4, 5))
    p = references.bilinear(projected(regularizer, student).double().numpy(), (2, 3), (4, 5))
    outcome = align(regularizer, student, teacher)
    t = teacher.values.double().numpy()
    assert outcome.cosine.item() == pytest.approx(-references.alignment(p, t), abs=COSINE)
    assert outcome.manifold.item() == pytest.approx(references.manifold(p, t), abs=COSINE)


@pytest.mark.parametrize("kind", [REPA, UREPA])
def test_gradients_reach_student_and_projector_and_nothing_else(kind):
    regularizer, student, teacher = kind(6, 5, projector=SMALL), tokens(6, (2, 3)), tokens(5)
    student.values.requires_grad_()
    teacher.values.requires_grad_()
    outcome = align(regularizer, student, teacher)
    outcome.loss.backward()
    assert teacher.values.grad is None
    assert (student.values.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in regularizer.parameters())
    parts = [outcome.cosine] if kind is REPA else [outcome.cosine, outcome.manifold]
    assert not any(part.requires_grad for part in parts)


def test_the_schedule_sets_the_weight_of_a_step_and_leaves_the_parts_unscaled():
    regularizer = REPA(6, 5, weight=1.0, schedule={"warmup_steps": 10, "cutoff_step": 20}, projector=SMALL)
    student, teacher = tokens(6), tokens(5)
    at = {step: align(regularizer, student, teacher, step) for step in (0, 5, 10, 19, 20)}
    assert {step: outcome.weight for step, outcome in at.items()} == {0: 0.0, 5: 0.5, 10: 1.0, 19: 1.0, 20: 0.0}
    for step, outcome in at.items():
        assert torch.equal(outcome.cosine, at[10].cosine)
        assert outcome.loss.item() == pytest.approx(-outcome.weight * outcome.cosine.item(), abs=UNIT), step


def test_autocast_projects_in_half_and_measures_in_float32():
    regularizer, student, teacher = UREPA(64, 48, projector={"width": 64}), tokens(64), tokens(48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = align(regularizer, student, teacher)
        p = regularizer.projectors[0](student).values
    assert p.dtype == torch.bfloat16
    assert outcome.loss.dtype == outcome.cosine.dtype == outcome.manifold.dtype == torch.float32
    p64, t64 = p.detach().double().numpy(), teacher.values.double().numpy()
    assert outcome.cosine.item() == pytest.approx(-references.alignment(p64, t64), abs=COSINE)
    assert outcome.manifold.item() == pytest.approx(references.manifold(p64, t64), abs=COSINE)


def test_half_precision_hidden_states_are_taken_as_they_come():
    regularizer, teacher = REPA(6, 5, projector=SMALL), tokens(5)
    half = Tokens(tokens(6).values.bfloat16(), GRID)
    outcome = align(regularizer, half, teacher)
    assert outcome.loss.dtype == torch.float32
    assert torch.equal(outcome.loss, align(regularizer, Tokens(half.values.float(), GRID), teacher).loss)


def test_zero_hidden_states_are_finite():
    regularizer, teacher = UREPA(6, 5, projector=SMALL), tokens(5)
    student = Tokens(torch.zeros(2, 12, 6, requires_grad=True), GRID)
    outcome = align(regularizer, student, teacher)
    outcome.loss.backward()
    assert outcome.cosine.item() == 0.0
    assert np.isfinite(outcome.loss.item())
    assert all(torch.isfinite(p.grad).all() for p in regularizer.parameters())


class TestSeveralEncoders:
    def test_the_loss_is_the_mean_over_them_with_a_projector_each(self):
        regularizer, student = UREPA(6, [5, 4], weight=0.5, manifold_weight=2.0, projector=SMALL), tokens(6)
        teachers = [tokens(5, (2, 2)), tokens(4)]
        outcome = align(regularizer, student, teachers)
        alignments, manifolds = [], []
        for projector, teacher in zip(regularizer.projectors, teachers, strict=True):
            p = projector(student).values.detach().double().numpy()
            p, t = references.bilinear(p, GRID, teacher.grid), teacher.values.double().numpy()
            alignments.append(references.alignment(p, t))
            manifolds.append(references.manifold(p, t))
        assert outcome.cosine.item() == pytest.approx(-np.mean(alignments), abs=COSINE)
        assert outcome.manifold.item() == pytest.approx(np.mean(manifolds), abs=COSINE)
        assert outcome.loss.item() == pytest.approx(0.5 * (np.mean(alignments) + 2 * np.mean(manifolds)), abs=COSINE)

    def test_the_same_one_twice_is_the_same_as_once(self):
        once, twice = REPA(6, 5, projector=SMALL), REPA(6, [5, 5], projector=SMALL)
        for projector in twice.projectors:
            projector.load_state_dict(once.projectors[0].state_dict())
        student, teacher = tokens(6), tokens(5)
        assert torch.equal(align(twice, student, [teacher, teacher]).loss, align(once, student, teacher).loss)

    def test_each_learns_from_its_own(self):
        regularizer, student = REPA(6, [5, 5], projector=SMALL), tokens(6)
        align(regularizer, student, [tokens(5), Tokens(torch.zeros(2, 12, 5), GRID)]).loss.backward()
        first, second = ([p.grad.abs().max() for p in projector.parameters()] for projector in regularizer.projectors)
        assert min(first) > 0
        assert max(second) == 0

    @pytest.mark.parametrize("given", [1, 3])
    def test_another_number_of_teachers_is_refused(self, given):
        with pytest.raises(ValueError, match=f"there are 2 encoders, got the tokens of {given}"):
            align(REPA(6, [5, 5], projector=SMALL), tokens(6), [tokens(5)] * given)


class TestResample:
    @pytest.mark.parametrize("projector", ["mlp", "conv"])
    def test_projecting_after_resampling(self, projector):
        regularizer = REPA(6, 5, projector={"type": projector, "width": 8}, resample={"when": "before"})
        student, teacher = tokens(6, (2, 3)), tokens(5, (4, 5))
        resampled = references.bilinear(student.values.double().numpy(), (2, 3), (4, 5))
        p = projected(regularizer, Tokens(torch.from_numpy(resampled).float(), (4, 5))).double().numpy()
        expected = -references.alignment(p, teacher.values.double().numpy())
        assert align(regularizer, student, teacher).cosine.item() == pytest.approx(expected, abs=COSINE)

    def test_shrinking_the_teacher(self):
        regularizer = UREPA(6, 5, projector=SMALL, resample={"side": "teacher"})
        student, teacher = tokens(6, (2, 3)), tokens(5, (4, 6))
        p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
        shrunk = t.reshape(2, 2, 2, 3, 2, 5).mean(axis=(2, 4)).reshape(2, 6, 5)
        outcome = align(regularizer, student, teacher)
        assert outcome.cosine.item() == pytest.approx(-references.alignment(p, shrunk), abs=COSINE)
        assert outcome.manifold.item() == pytest.approx(references.manifold(p, shrunk), abs=COSINE)

    @pytest.mark.parametrize("when", ["after", "before"])
    def test_equal_grids_are_left_alone(self, when):
        regularizer, student, teacher = REPA(6, 5, projector=SMALL, resample={"when": when}), tokens(6), tokens(5)
        plain = REPA(6, 5, projector=SMALL)
        plain.load_state_dict(regularizer.state_dict())
        assert torch.equal(align(regularizer, student, teacher).loss, align(plain, student, teacher).loss)


class TestWithoutSpatialAlignment:
    def test_means_over_tokens_are_compared(self):
        regularizer = REPA(6, 5, weight=0.5, projector=SMALL, spatial_align=False)
        student, teacher = tokens(6, (2, 3)), tokens(5, (4, 5))
        p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
        expected = references.alignment(p.mean(axis=1, keepdims=True), t.mean(axis=1, keepdims=True))
        assert align(regularizer, student, teacher).loss.item() == pytest.approx(0.5 * expected, abs=COSINE)

    def test_every_token_gets_the_same_gradient(self):
        regularizer, teacher = REPA(6, 5, projector="linear", spatial_align=False), tokens(5)
        regularizer.projectors[0].net.layers[0] = torch.nn.Identity()
        student = Tokens(torch.randn(2, 12, 6, requires_grad=True), GRID)
        align(regularizer, student, teacher).loss.backward()
        gradient = student.values.grad
        assert gradient.abs().amax(-1).min() > 0
        torch.testing.assert_close(gradient, gradient[:, :1].expand(-1, 12, -1))

    def test_no_pairs_of_tokens_are_left_but_pairs_of_images_are(self):
        student, teacher = tokens(6), tokens(5)
        off = UREPA(6, 5, projector=SMALL, spatial_align=False, manifold_weight=0.0)
        repa = REPA(6, 5, projector=SMALL, spatial_align=False)
        repa.load_state_dict(off.state_dict())
        assert torch.equal(align(off, student, teacher).loss, align(repa, student, teacher).loss)
        regularizer = UREPA(6, 5, projector=SMALL, manifold={"scope": "batch_pooled"}, spatial_align=False)
        p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
        expected = references.manifold(p.mean(axis=1)[None], t.mean(axis=1)[None])
        assert align(regularizer, student, teacher).manifold.item() == pytest.approx(expected, abs=COSINE)


def test_spatial_norm_is_the_encoders_alone_and_comes_before_resampling():
    regularizer, student, teacher = REPA(6, 5, projector=SMALL, spatial_norm=0.6), tokens(6, (2, 3)), tokens(5, (4, 6))
    t = teacher.values.double().numpy()
    t = (t - 0.6 * t.mean(axis=1, keepdims=True)) / (t.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    p = references.bilinear(projected(regularizer, student).double().numpy(), (2, 3), (4, 6))
    assert align(regularizer, student, teacher).cosine.item() == pytest.approx(-references.alignment(p, t), abs=COSINE)


def test_nt_xent_replaces_the_alignment_and_the_cosine_is_told_all_the_same():
    regularizer = UREPA(6, 5, weight=0.5, manifold_weight=3.0, projector=SMALL, loss="nt_xent", temperature=0.3)
    student, teacher = tokens(6), tokens(5)
    outcome = align(regularizer, student, teacher)
    p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
    assert outcome.cosine.item() == pytest.approx(-references.alignment(p, t), abs=COSINE)
    expected = 0.5 * (references.nt_xent(p, t, 0.3) + 3 * references.manifold(p, t))
    assert outcome.loss.item() == pytest.approx(expected, abs=REGULARIZER)


def test_the_manifold_is_what_was_asked_for():
    student, teacher = tokens(6), tokens(5)
    regularizer = UREPA(6, 5, manifold_weight=1.0, projector=SMALL, manifold={"reduction": "sum"})
    p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
    assert align(regularizer, student, teacher).manifold.item() == pytest.approx(
        144 * references.manifold(p, t), rel=REGULARIZER
    )


def test_signals_that_do_not_fit_are_refused():
    student = tokens(6)
    with pytest.raises(ValueError, match="there is a single token"):
        align(UREPA(6, 5, projector=SMALL), student, tokens(5, (1, 1)))
    with pytest.raises(ValueError, match="must be the same"):
        align(REPA(6, 5, projector=SMALL), student, tokens(4))
    with pytest.raises(ValueError, match="must be the same"):
        align(REPA(6, 5, projector=SMALL), student, tokens(5, batch=3))
    with pytest.raises(ValueError, match="a single one"):
        align(UREPA(6, 5, projector=SMALL, manifold={"scope": "batch_pooled"}), tokens(6, batch=1), tokens(5, batch=1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"manifold_weight": -1.0}, "manifold_weight\n  Input should be greater than or equal to 0.*=-1"),
        ({"weight": -0.5}, "weight\n  Input should be greater than or equal to 0.*=-0.5"),
        ({"weight": float("nan")}, "weight\n  Input should be (a finite number|greater than or equal to 0)"),
        ({"loss": "l2"}, "loss\n  Input should be 'cosine' or 'nt_xent'.*'l2'"),
        ({"temperature": 0.0}, "temperature\n  Input should be greater than 0"),
        ({"spatial_norm": -1.0}, "spatial_norm\n  Input should be greater than or equal to 0.*=-1"),
        ({"projector": "cnn"}, "projector.type\n  Input should be 'mlp', 'linear' or 'conv'.*'cnn'"),
        ({"resample": {"side": "both"}}, "resample.side\n  Input should be 'student' or 'teacher'.*'both'"),
        ({"resample": {"when": "never"}}, "resample.when\n  Input should be 'after' or 'before'.*'never'"),
        (
            {"schedule": {"type": "step"}},
            "schedule.type\n  Input should be 'constant', 'linear', 'cosine' or 'polynomial'",
        ),
        ({"width": 8}, "width\n  Extra inputs are not permitted"),
        ({"spatial_align": False}, "spatial_align false leaves one token an image, so there are no pairs of tokens"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        UREPA(6, 5, **settings)


def test_a_decay_needs_an_end():
    with pytest.raises(ValueError, match="a cosine schedule needs decay_steps, the step at which it ends"):
        REPA(6, 5, schedule={"type": "cosine"})
    settings = REPASettings(schedule={"type": "cosine"}, block_index=None)
    assert REPA(settings.resolved(7, 100, 12), Shapes((6,), (5,))).weight_at(50) == pytest.approx(0.25)


@pytest.mark.parametrize("kind, settings", [(REPA, REPASettings), (UREPA, UREPASettings)])
def test_widths_and_keywords_mean_settings_and_shapes(kind, settings):
    fields = {
        "weight": 0.3,
        "projector": {"type": "conv", "width": 8},
        "loss": "nt_xent",
        "resample": {"side": "teacher"},
    }
    one, other = kind(6, [5, 4], **fields), kind(settings(**fields), Shapes((6,), (5, 4)))
    assert one.settings == other.settings
    assert one.shapes == other.shapes
    other.load_state_dict(one.state_dict())
    student, teachers = tokens(6), [tokens(5), tokens(4)]
    assert torch.equal(align(one, student, teachers).loss, align(other, student, teachers).loss)


def test_a_target_of_ones_own_has_the_settings_of_targets():
    class Mine(EncoderTarget):
        def forward(self, signals, step):
            return Loss(signals.taps[0].values.mean())

    assert Mine(8, 6, projector={"type": "linear"}).settings.projector.type == "linear"
