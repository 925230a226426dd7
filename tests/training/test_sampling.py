from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from repa_lab.models.sit import SiT
from repa_lab.spec import EvaluateConfig
from repa_lab.spec.evaluate import GuidanceConfig, SamplerConfig
from repa_lab.training.batches import generator
from repa_lab.training.device import computing_in
from repa_lab.training.diffusion import FieldSampler, euler_maruyama, guided, integrate, kinds_of, shares
from tests.rounding import SIT, rounding

SHAPE = (1, 2, 3)
NO_GUIDANCE = GuidanceConfig()
CPU = torch.device("cpu")


def ode(solver: str, steps: int) -> SamplerConfig:
    return SamplerConfig(type="ode", solver=solver, steps=steps)


def sampler_of(shape, classes, sampler, guidance, seed, labels="balanced") -> Callable[[nn.Module], FieldSampler]:
    """What makes the sampler of a denoiser."""
    config = EvaluateConfig(sampler=sampler, guidance=guidance, labels=labels)
    return lambda denoiser: FieldSampler(denoiser, None, shape, classes, config, seed, CPU)


def draw(sampling, denoiser: nn.Module, count: int, batch_size: int) -> torch.Tensor:
    """The first samples, in batches."""
    return torch.cat([sampling(denoiser).draw(index) for index in shares(count, batch_size)])


class Field(nn.Module):
    """A velocity field that counts its evaluations and keeps their times and labels."""

    def __init__(self, field=lambda x, t: torch.zeros_like(x)) -> None:
        super().__init__()
        self.field = field
        self.times: list[float] = []
        self.labels: list[list[int]] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.times.append(t[0].item())
        self.labels.append(y.tolist())
        self.dtypes |= {x.dtype, t.dtype}
        return self.field(x, t.view(-1, 1, 1, 1))


def gaussian_velocity(s: float):
    """The exact velocity of the linear path for data N(0, s^2 I): E[noise - data | x_t]."""
    return lambda x, t, start: x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


class TestODE:
    @pytest.mark.parametrize("steps", [2, 7, 50])
    def test_euler_on_a_linear_field(self, steps):
        # dx = a x dt in N steps of -1/N multiplies x by (1 - a/N)^N.
        x = torch.randn(3, *SHAPE, dtype=torch.float64)
        found = integrate(lambda x, t, start: 0.7 * x, lambda: x, ode("euler", steps))
        torch.testing.assert_close(found, x * (1 - 0.7 / steps) ** steps, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("steps", [2, 7, 50])
    def test_heun_on_a_linear_field(self, steps):
        # All steps but the last multiply by 1 - h + h^2/2 (h = a/N); the last, which ends at 0, is Euler's.
        x, h = torch.randn(3, *SHAPE, dtype=torch.float64), 0.7 / steps
        found = integrate(lambda x, t, start: 0.7 * x, lambda: x, ode("heun", steps))
        torch.testing.assert_close(found, x * (1 - h + h**2 / 2) ** (steps - 1) * (1 - h), rtol=1e-12, atol=0)

    def test_euler_on_a_field_of_time(self):
        # dx = 2 t dt from 1 to 0 sums 2 t_i / N over t_i = 1, ..., 1/N: N (N + 1) / N^2.
        start = torch.zeros(1, 1, dtype=torch.float64)
        found = integrate(lambda x, t, start: torch.full_like(x, 2 * t), lambda: start, ode("euler", 10))
        assert found.item() == pytest.approx(-1.1, abs=1e-12)

    @pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
    def test_converges_with_its_order(self, solver, order):
        velocity, x = gaussian_velocity(0.5), torch.ones(1, 1, dtype=torch.float64)
        exact = 0.5  # noise of size 1 becomes data of size s
        errors = [abs(integrate(velocity, lambda: x, ode(solver, n)).item() - exact) for n in (40, 80, 160)]
        for coarse, fine in itertools.pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)

    @pytest.mark.parametrize("solver, evaluations", [("euler", 50), ("heun", 99)])
    def test_evaluations(self, solver, evaluations):
        times: list[float] = []
        integrate(lambda x, t, start: times.append(t) or x, lambda: torch.zeros(1, 1), ode(solver, 50))
        assert len(times) == evaluations
        assert times[0] == 1.0
        assert min(times) == pytest.approx(0.02)  # never at 0, where nothing was trained


def reference_sde(velocity, noises: list[np.ndarray], steps: int) -> np.ndarray:
    """Reverse SDE of SiT with diffusion w(t) = 2t, on alpha = 1 - t, sigma = t; from its general formulas.

    score = -noise estimate / sigma, the noise estimate being v alpha + x over alpha sigma' - alpha' sigma (= 1);
    dx = (v - w/2 score) dt + sqrt(w) dW, backwards in time.
    """
    times = [1 + i * (0.04 - 1) / (steps - 1) for i in range(steps)] + [0.0]
    x = noises[0]
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        v = velocity(x, t)
        alpha, sigma, w = 1 - t, t, 2 * t
        score = -(alpha * v + x) / sigma
        x = x + (v - w / 2 * score) * dt
        if i < steps - 1:
            x = x + math.sqrt(w * -dt) * noises[i + 1]
    return x


def expected_std(s: float, steps: int) -> float:
    """Standard deviation of the sampler's result for data N(0, s^2 I), carried through its steps in closed form.

    The exact score is -x / ((1 - t)^2 s^2 + t^2), so every step multiplies x by a number and adds noise of variance 2 t dt.
    """
    times, variance = [*np.linspace(1, 0.04, steps), 0.0], 1.0
    for now, after in itertools.pairwise(times):
        marginal = (1 - now) ** 2 * s**2 + now**2
        drift = (now - (1 - now) * s**2) / marginal + now / marginal
        variance = (1 + drift * (after - now)) ** 2 * variance + (2 * now * (now - after) if after else 0)
    return math.sqrt(variance)


class TestSDE:
    def drawn(self, count: int, size: int = 5):
        noises = list(np.random.default_rng(0).standard_normal((count, size)))
        left = iter(noises)
        return noises, lambda: torch.from_numpy(next(left))

    @pytest.mark.parametrize("steps", [2, 3, 25])
    def test_agrees_with_an_independent_implementation(self, steps):
        def velocity(x, t, start=0.0):
            return (
                np.sin(3 * x) * t + 0.3 * x - t**2
                if isinstance(x, np.ndarray)
                else torch.from_numpy(velocity(x.numpy(), t))
            )

        noises, draw = self.drawn(steps)
        found = euler_maruyama(velocity, draw, steps)
        np.testing.assert_allclose(found.numpy(), reference_sde(velocity, noises, steps), rtol=0, atol=1e-12)

    def test_the_papers_grid(self):
        times: list[float] = []
        _, draw = self.drawn(250)
        euler_maruyama(lambda x, t, start: times.append(t) or torch.zeros_like(x), draw, 250)
        assert len(times) == 250
        assert (times[0], times[-1]) == (1.0, pytest.approx(0.04, abs=1e-15))
        np.testing.assert_allclose(np.diff(times), -0.0038554217, atol=1e-9)

    @pytest.mark.parametrize("steps", [2, 10])
    def test_draws_noise_for_the_start_and_all_steps_but_the_last(self, steps):
        drawn: list[int] = []

        def draw() -> torch.Tensor:
            drawn.append(1)
            return torch.randn(3, dtype=torch.float64)

        euler_maruyama(lambda x, t, start: x, draw, steps)
        assert len(drawn) == steps

    def test_the_last_step_is_deterministic(self):
        # Without velocity the score is -x / t and the drift x, so the step from 0.04 to 0 leaves 0.96 x.
        seen: list[torch.Tensor] = []
        _, draw = self.drawn(9)
        found = euler_maruyama(lambda x, t, start: seen.append(x) or torch.zeros_like(x), draw, 9)
        torch.testing.assert_close(found, 0.96 * seen[-1], rtol=1e-12, atol=0)

    @pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
    def test_has_the_variance_of_the_data(self, s):
        count, draws = 40_000, torch.Generator().manual_seed(0)

        def noise() -> torch.Tensor:
            return torch.randn(count, generator=draws, dtype=torch.float64)

        sde = euler_maruyama(gaussian_velocity(s), noise, 250)
        plain = integrate(gaussian_velocity(s), noise, ode("heun", 250))
        four_standard_errors = 4 / (2 * count) ** 0.5
        assert plain.std().item() / s == pytest.approx(1, abs=four_standard_errors)
        assert sde.std().item() / expected_std(s, 250) == pytest.approx(1, abs=four_standard_errors)
        assert abs(sde.mean().item()) < 4 * s / count**0.5
        # The discrete process itself comes to the data's variance as its steps shrink, up to the cut at t = 0.04.
        assert expected_std(s, 250) / s == pytest.approx(1, abs=0.02)


passes = pytest.mark.parametrize("is_one_pass", [False, True], ids=["two passes", "one pass"])


class TestGuidance:
    @passes
    def test_is_affine_in_the_two_velocities(self, is_one_pass):
        class ByLabel(nn.Module):
            def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.where(y.view(-1, 1) == 10, 1.0, 5.0 + y.view(-1, 1)) * torch.ones_like(x)

        labels = torch.tensor([0, 2])
        velocity = guided(ByLabel(), labels, 10, GuidanceConfig(scale=1.5), is_one_pass)
        # 1 + 1.5 * (5 - 1) and 1 + 1.5 * (7 - 1)
        assert velocity(torch.zeros(2, 1, dtype=torch.float64), 0.5, 0.5).flatten().tolist() == [7.0, 10.0]

    # 104: the grid's points between 0.3 and 0.7.
    @pytest.mark.parametrize(
        "low, high, evaluations", [(0, 0.7, 250 + 172), (0, 1, 500), (0.3, 0.7, 250 + 104), (0, 0.01, 250)]
    )
    def test_doubles_the_evaluations_of_its_interval(self, low, high, evaluations):
        field = Field()
        config = SamplerConfig(type="sde", steps=250)
        sampling = sampler_of(SHAPE, 10, config, GuidanceConfig(scale=1.8, low=float(low), high=float(high)), 0)
        draw(sampling, field, 2, 2)
        assert len(field.times) == evaluations

    @passes
    def test_the_ends_of_the_interval_belong_to_it(self, is_one_pass):
        field = Field()
        velocity = guided(field, torch.tensor([3]), 10, GuidanceConfig(scale=2.0, low=0.25, high=0.5), is_one_pass)
        for t in (0.25, 0.5):
            velocity(torch.zeros(1, *SHAPE), 0.1, t)
        assert field.labels == ([[3, 10], [3, 10]] if is_one_pass else [[3], [10], [3], [10]])
        velocity(torch.zeros(1, *SHAPE), 0.5, 0.5 + 1e-9)
        assert field.labels[-1] == [3]

    @pytest.mark.parametrize("count", [1, 5, 7])
    def test_one_pass_of_a_denoiser_is_two_within_rounding(self, count):
        torch.manual_seed(0)
        denoiser = SiT.from_size("nano/2", 1, 8, 10).eval().requires_grad_(False)
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.1)
        x, labels = torch.randn(count, 1, 8, 8).double(), torch.arange(count)
        one, two = (
            guided(denoiser, labels, 10, GuidanceConfig(scale=2.0), is_one_pass)(x, 0.3, 0.3)
            for is_one_pass in (True, False)
        )
        assert two.abs().max() > 0.1
        error = (2 * 2.0 - 1) * rounding(two, SIT)  # twice the told one less the null one
        torch.testing.assert_close(one, two, rtol=0, atol=error)

    @passes
    @pytest.mark.parametrize(("low", "high"), [(0.0, 0.7), (0.25, 0.5), (0.0, 1.0)])
    def test_heun_guides_both_evaluations_of_a_step_by_its_start(self, low, high, is_one_pass):
        """An independent implementation of REPA's sampler in NumPy, on a grid whose points fall between the two rules."""

        def field(x, t, y):
            module = np if isinstance(x, np.ndarray) else torch
            return module.sin(3 * x + y) * t + 0.3 * x * (y == 10)

        class Net(nn.Module):
            def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return field(x.double(), t.double().view(-1, 1), y.view(-1, 1).double())

        noise, steps, scale, asked = np.random.default_rng(0).standard_normal((2, 3)), 10, 2.5, 0
        x = noise
        for i in range(steps):
            t, after, is_guided = 1 - i / steps, 1 - (i + 1) / steps, low <= 1 - i / steps <= high

            def velocity(x, t, is_guided=is_guided):
                x, t = x.astype(np.float32).astype(np.float64), np.float64(np.float32(t))  # what the denoiser is given
                told = field(x, t, np.array([[3.0], [4.0]]))
                return field(x, t, 10.0) + scale * (told - field(x, t, 10.0)) if is_guided else told

            slope = velocity(x, t)
            ahead = x + slope * (after - t)
            x = ahead if i == steps - 1 else x + (slope + velocity(ahead, after)) / 2 * (after - t)
            asked += (2 if is_guided and not is_one_pass else 1) * (1 if i == steps - 1 else 2)
        net, calls = Net(), []
        net.register_forward_hook(lambda *given: calls.append(1))
        velocity = guided(net, torch.tensor([3, 4]), 10, GuidanceConfig(scale=scale, low=low, high=high), is_one_pass)
        found = integrate(velocity, lambda: torch.from_numpy(noise), ode("heun", steps))
        np.testing.assert_allclose(found.numpy(), x, rtol=0, atol=1e-6)
        assert len(calls) == asked

    def test_scale_1_never_asks_for_the_null_label(self):
        field = Field()
        draw(sampler_of(SHAPE, 10, ode("heun", 5), GuidanceConfig(scale=1.0), 0), field, 4, 4)
        assert field.labels == [[0, 1, 2, 3]] * 9


class TestSampling:
    @pytest.mark.parametrize(
        "sampler", [ode("euler", 4), ode("heun", 4), SamplerConfig(type="sde", steps=4)], ids=["e", "h", "s"]
    )
    def test_a_sample_depends_on_its_number_alone(self, sampler):
        sampling = sampler_of(SHAPE, 3, sampler, GuidanceConfig(scale=1.5, high=0.6), 5)

        field = Field(lambda x, t: torch.sin(5 * x) * t + x)
        whole = draw(sampling, field, 10, 10)
        assert (whole.shape, whole.dtype) == ((10, *SHAPE), torch.float32)
        for batch_size in (1, 3, 4, 64):
            assert torch.equal(draw(sampling, field, 10, batch_size), whole)
        assert torch.equal(draw(sampling, field, 4, 4), whole[:4])
        assert torch.equal(sampling(field).draw(range(7, 9)), whole[7:9])

    def test_starts_from_its_own_stream(self):
        sampling = sampler_of(SHAPE, 10, ode("euler", 2), NO_GUIDANCE, 7)
        found = draw(sampling, Field(), 3, 2)
        for i in range(3):
            assert torch.equal(found[i], torch.randn(SHAPE, generator=generator(7, "sampling", i)))
        other = sampler_of(SHAPE, 10, ode("euler", 2), NO_GUIDANCE, 8)
        assert not torch.equal(other(Field()).draw(range(3)), found)

    def test_labels_take_turns(self):
        field = Field()
        draw(sampler_of(SHAPE, 3, ode("euler", 2), NO_GUIDANCE, 0), field, 8, 5)
        assert field.labels == [[0, 1, 2, 0, 1]] * 2 + [[2, 0, 1]] * 2

    @pytest.mark.parametrize("processes", [1, 2, 8])
    def test_random_labels_depend_on_the_number_alone(self, processes):
        sampling = sampler_of(SHAPE, 7, ode("euler", 2), NO_GUIDANCE, 3, "random")
        whole = kinds_of(range(64), 7, "random", 3)
        found = {}
        for number in range(processes):
            for index in shares(64, 5, (number, processes)):
                field = Field()
                sampling(field).draw(index)
                found |= dict(zip(index, field.labels[0], strict=True))
        assert [found[i] for i in range(64)] == whole
        assert kinds_of(range(64), 7, "random", 4) != whole

    def test_labels_are_balanced_or_drawn_uniformly(self):
        assert set(Counter(kinds_of(range(5000), 100, "balanced", 0)).values()) == {50}
        counts = Counter(kinds_of(range(5000), 10, "random", 0))
        assert set(counts) == set(range(10))
        # Chi-squared with 9 degrees of freedom: below 27.9 in 999 of 1,000 such draws, and not 0 as for balanced ones.
        assert 0 < sum((count - 500) ** 2 / 500 for count in counts.values()) < 27.9

    def test_the_noise_is_that_of_balanced_ones(self):
        one, other = (
            sampler_of(SHAPE, 10, ode("euler", 2), NO_GUIDANCE, 7, labels) for labels in ("balanced", "random")
        )
        assert torch.equal(draw(one, Field(), 3, 2), draw(other, Field(), 3, 2))

    def test_the_denoiser_sees_float32(self):
        field = Field()
        draw(sampler_of(SHAPE, 3, ode("euler", 2), NO_GUIDANCE, 0), field, 1, 1)
        assert field.dtypes == {torch.float32}

    def test_the_state_is_kept_in_float64(self):
        # 1,000 steps of 1e-8 each would leave a float32 state near 1 where it was.
        sampling = sampler_of((1, 1, 1), 1, ode("euler", 1000), NO_GUIDANCE, 0)
        start = torch.randn(1, 1, 1, generator=generator(0, "sampling", 0)).double()
        found = sampling(Field(lambda x, t: torch.full_like(x, -1e-5))).draw(range(1))
        assert (found.double() - start).item() == pytest.approx(1e-5, rel=0.02)

    def test_draws_without_gradients(self):
        field = Field()
        field.weight = nn.Parameter(torch.ones(()))
        field.field = lambda x, t: x * field.weight
        sampling = sampler_of(SHAPE, 3, ode("euler", 2), NO_GUIDANCE, 0)
        assert not sampling(field).draw(range(1)).requires_grad


class TestShares:
    @pytest.mark.parametrize("count, batch_size", [(10, 3), (12, 4), (1, 8), (50, 7), (16, 16)])
    @pytest.mark.parametrize("processes", [1, 2, 3, 5])
    def test_processes_draw_the_batches_of_one_and_each_once(self, count, batch_size, processes):
        alone = list(shares(count, batch_size))
        assert [i for index in alone for i in index] == list(range(count))
        assert all(len(index) == batch_size for index in alone[:-1])
        together = [list(shares(count, batch_size, (number, processes))) for number in range(processes)]
        assert sorted((one for part in together for one in part), key=lambda index: index.start) == alone
        assert max(map(len, together)) - min(map(len, together)) <= 1

    def test_by_hand(self):
        assert list(shares(10, 3, (1, 2))) == [range(3, 6), range(9, 10)]
        assert list(shares(10, 3, (3, 4))) == [range(9, 10)]
        assert list(shares(2, 3, (1, 2))) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_denoiser_is_not_compiled_anew_for_each_measurement(precision):
    """Training and measuring in turn, with guidance: the graphs of the first measurements serve the later ones."""
    torch._dynamo.reset()
    counter, denoiser = CompileCounter(), SiT.from_size("nano/2", 1, 8, 10)
    denoiser.compile(backend=counter)
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    graphs = []
    for _ in range(4):
        denoiser.train()
        denoiser(x, t, y).sum().backward()
        denoiser.eval()
        with torch.no_grad(), computing_in(denoiser, precision, CPU):
            velocity = guided(denoiser, y, 10, GuidanceConfig(scale=2.0, low=0.5), is_one_pass=True)
            velocity(x.double(), 0.7, 0.7), velocity(x.double(), 0.3, 0.3)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1] == graphs[2] == graphs[3]
