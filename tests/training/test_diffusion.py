from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy import stats

from repa_lab.models.released import PretrainedError
from repa_lab.spec.train import TimeSettings
from repa_lab.training.batches import generator
from repa_lab.training.diffusion import LOGIT_NORMAL, UNIFORM, Diffusion, Flow, process_of
from tests.rounding import UNIT, of_products, rounding

COUNT = 20_000


def draw(name: str = "t") -> torch.Generator:
    return generator(0, name)


# The files of released pipelines, without what only sampling looks at.
SD15 = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False}  # fmt: skip
SD21 = {"_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}  # fmt: skip
SDXL = {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False}  # fmt: skip
KOLORS = {**SDXL, "beta_end": 0.014, "num_train_timesteps": 1100, "rescale_betas_zero_snr": False}
PIXART = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_end": 0.02,
          "beta_schedule": "linear", "beta_start": 0.0001, "num_train_timesteps": 1000, "prediction_type": "epsilon",
          "solver_order": 2, "variance_type": "learned_range"}  # fmt: skip
HUNYUAN_DIT = {"_class_name": "DDPMScheduler", "beta_end": 0.03, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
               "num_train_timesteps": 1000, "prediction_type": "v_prediction", "clip_sample": False}  # fmt: skip
COSINE = {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2",
          "num_train_timesteps": 1000, "prediction_type": "sample"}  # fmt: skip
SANA = {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
        "flow_shift": 3.0, "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
        "use_flow_sigmas": True}  # fmt: skip
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SCHNELL = {**SD3, "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "use_dynamic_shifting": False}
FLUX = {**SCHNELL, "shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}
PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon",
              "rho": 7.0, "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002}  # fmt: skip


def alphas(config: dict) -> np.ndarray:
    """The cumulated product, in float64."""
    first, last, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, steps) ** 2
    elif config["beta_schedule"] == "linear":
        betas = np.linspace(first, last, steps)
    else:  # 2102.09672, Eq. 17
        signal = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    return np.cumprod(1 - betas)


def pair(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 4, 5), torch.randn(batch, 3, 4, 5)


class TestFlow:
    def test_predicts_noise_minus_data(self):
        x, noise = pair(4)
        t = torch.tensor([0.0, 0.25, 0.5, 1.0])
        noisy, target = Flow(3.0, LOGIT_NORMAL).corrupt(x, noise, t)
        assert torch.equal(target, noise - x)
        time = t.double().numpy()[:, None, None, None]
        expected = (1 - time) * x.double().numpy() + time * noise.double().numpy()
        np.testing.assert_allclose(noisy.numpy(), expected, rtol=0, atol=rounding(noise, (2, 2)))

    def test_adds_the_noise_that_the_scheduler_does(self):
        """Of diffusers: its sigma is our time, whatever the shift."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        x, noise = pair(6)
        which = torch.tensor([0, 1, 10, 500, 998, 999])
        noisy, _ = Flow(3.0).corrupt(x, noise, scheduler.sigmas[which])
        torch.testing.assert_close(
            noisy, scheduler.scale_noise(x, scheduler.timesteps[which], noise), rtol=0, atol=rounding(noise, (2, 2))
        )

    def test_the_papers_times_are_what_they_were(self):
        """Bit for bit, for every run that was ever started draws them."""
        assert torch.equal(Flow().times(UNIFORM, 50, draw()), torch.rand(50, generator=draw()))
        assert torch.equal(Flow().times(LOGIT_NORMAL, 50, draw()), torch.randn(50, generator=draw()).sigmoid())

    @pytest.mark.parametrize(("default", "other"), [(UNIFORM, LOGIT_NORMAL), (LOGIT_NORMAL, UNIFORM)])
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_the_default_is_what_the_process_says(self, default, other, shift):
        process = Flow(shift, default)
        found = process.times(None, 50, draw())
        assert torch.equal(found, process.times(default, 50, draw()))
        assert not torch.equal(found, process.times(other, 50, draw()))
        assert torch.equal(Flow().times(None, 50, draw()), torch.rand(50, generator=draw()))

    @pytest.mark.parametrize("shift", [0.5, 1.73, 3.0, 6.0])
    def test_the_shift_by_its_formula(self, shift):
        t = torch.rand(50, generator=draw()).double()
        found = Flow(shift).times(UNIFORM, 50, draw())
        # sigma / (1 - sigma) is multiplied by the shift (SD3, Eq. 23).
        odds = shift * t / (1 - t)
        torch.testing.assert_close(found.double(), odds / (1 + odds), rtol=0, atol=4 * UNIT)

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_uniform_times_are_uniform_before_the_shift(self, shift):
        t = Flow(shift).times(UNIFORM, COUNT, draw()).double().numpy()
        assert stats.kstest(t / (shift - (shift - 1) * t), "uniform").pvalue > 1e-3
        assert t.min() >= 0
        assert t.max() <= 1

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.5)])
    def test_logit_normal_times_have_a_normal_logit_around_that_of_the_shift(self, shift, mean, std):
        t = Flow(shift).times(TimeSettings(mean=mean, std=std), COUNT, draw()).double()
        assert stats.kstest((torch.logit(t).numpy() - np.log(shift) - mean) / std, "norm").pvalue > 1e-3


CONFIGS = {"sd15": SD15, "kolors": KOLORS, "pixart": PIXART, "hunyuan_dit": HUNYUAN_DIT, "cosine": COSINE}


class TestDiffusion:
    @pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
    def config(self, request) -> dict:
        return request.param

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_agrees_with_an_independent_computation(self, config, prediction):
        steps = config["num_train_timesteps"]
        which = np.array([0, 1, 250, 500, steps - 2, steps - 1])
        x, noise = pair(6)
        process = process_of({**config, "prediction_type": prediction})
        noisy, target = process.corrupt(x, noise, torch.from_numpy(which / 1000).float())
        a = alphas(config)[which][:, None, None, None]
        x_, noise_ = x.double().numpy(), noise.double().numpy()
        error = of_products(noise, steps)
        np.testing.assert_allclose(noisy.numpy(), np.sqrt(a) * x_ + np.sqrt(1 - a) * noise_, rtol=0, atol=error)
        wanted = {"epsilon": noise_, "sample": x_, "v_prediction": np.sqrt(a) * noise_ - np.sqrt(1 - a) * x_}[
            prediction
        ]
        np.testing.assert_allclose(target.numpy(), wanted, rtol=0, atol=error)

    def test_adds_noise_and_gives_the_velocity_as_the_scheduler_does(self, config):
        scheduler = DDPMScheduler.from_config(config)
        which = torch.arange(0, config["num_train_timesteps"], 7)
        x, noise = pair(len(which))
        noisy, velocity = process_of({**config, "prediction_type": "v_prediction"}).corrupt(x, noise, which / 1000)
        error = rounding(noise, (2, 2))
        torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, which), rtol=0, atol=error)
        torch.testing.assert_close(velocity, scheduler.get_velocity(x, noise, which), rtol=0, atol=error)

    def test_image_and_noise_follow_from_the_velocity(self):
        x, noise = pair(3)
        which = torch.tensor([10, 400, 999])
        noisy, velocity = process_of(SD21).corrupt(x, noise, which / 1000)
        a = torch.from_numpy(alphas(SD21)[which]).float().view(-1, 1, 1, 1)
        error = of_products(torch.cat([x, noise]), 2 * 1000)  # by two scales
        torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * velocity, x, rtol=0, atol=error)
        torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * velocity, noise, rtol=0, atol=error)

    def test_at_zero_terminal_snr_nothing_of_the_image_is_left(self):
        config = {**SD21, "rescale_betas_zero_snr": True}
        x, noise = pair(3)
        noisy, velocity = process_of(config).corrupt(x, noise, torch.tensor([0.999, 0.5, 0.0]))
        assert torch.equal(noisy[0], noise[0])
        assert torch.equal(velocity[0], -x[0])
        # 2305.08891, Algorithm 1: the signal is shifted so that it ends at 0 and scaled so that it begins as before.
        signal = np.sqrt(alphas(SD21))
        scaled = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        for row, step in ((1, 500), (2, 0)):
            expected = (
                scaled[step] * x[row].double().numpy() + np.sqrt(1 - scaled[step] ** 2) * noise[row].double().numpy()
            )
            # The signal is a product of a factor for each step, and the noise's share a root of what it leaves.
            error = of_products(x[row] - noise[row], step + 4) / np.sqrt(1 - scaled[step] ** 2)
            np.testing.assert_allclose(noisy[row].numpy(), expected, rtol=0, atol=error)
        _, sample = process_of({**config, "prediction_type": "sample"}).corrupt(x, noise, torch.full((3,), 0.999))
        assert torch.equal(sample, x)

    def test_a_time_between_two_steps_is_the_nearest_ones(self):
        process, (x, noise) = process_of(SD15), pair(1)

        def at(t: float) -> torch.Tensor:
            return process.corrupt(x, noise, torch.tensor([t]))[0]

        assert torch.equal(at(0.5004), at(0.5))
        assert torch.equal(at(0.5006), at(0.501))
        assert not torch.equal(at(0.5), at(0.501))
        assert torch.equal(at(0.9996), at(0.999))  # the last one's, for there is no step 1,000
        assert torch.equal(at(1.0), at(0.999))

    @pytest.mark.parametrize("config", [SD15, KOLORS], ids=["1,000 steps", "1,100 steps"])
    def test_times_are_thousandths_from_all_over(self, config):
        steps = config["num_train_timesteps"]
        process = process_of(config)
        t = process.times(UNIFORM, 200 * steps, draw())
        assert t.dtype == torch.float32
        which = (t.double() * 1000).numpy()
        assert np.abs(which - which.round()).max() < 1e-4
        counts = np.bincount(which.round().astype(int))
        assert len(counts) == steps
        assert stats.chisquare(counts).pvalue > 1e-3
        assert torch.equal(process.times(None, 300, draw()), process.times(UNIFORM, 300, draw()))

    def test_kolors_last_time_is_1_099(self):
        t = process_of(KOLORS).times(None, 50_000, draw())
        assert t.max() == torch.tensor(1.099)
        assert t.min() == 0
        x, noise = pair(1)
        noisy, target = process_of(KOLORS).corrupt(x, noise, torch.tensor([1.099]))
        a = alphas(KOLORS)[-1]
        expected = a**0.5 * x.numpy() + (1 - a) ** 0.5 * noise.numpy()
        np.testing.assert_allclose(noisy.numpy(), expected, rtol=0, atol=of_products(noise, 1100))
        assert torch.equal(target, noise)

    @pytest.mark.parametrize("config", [SD15, KOLORS], ids=["1,000 steps", "1,100 steps"])
    def test_every_time_finds_its_own_step_and_the_denoiser_its_number(self, config):
        steps = config["num_train_timesteps"]
        t = torch.arange(steps) / 1000  # as they are drawn
        assert (t * 1000 - torch.arange(steps)).abs().max() < 2e-4
        signal, _ = process_of({**config, "prediction_type": "sample"}).corrupt(
            torch.ones(steps, 1, 1, 1), torch.zeros(steps, 1, 1, 1), t
        )
        expected = np.sqrt(alphas(config))
        np.testing.assert_allclose(signal.flatten().numpy(), expected, rtol=of_products(np.ones(1), steps), atol=0)
        assert (signal.flatten().diff() < 0).all()

    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.5)])
    def test_logit_normal_times_fall_on_steps(self, mean, std):
        t = process_of(SD15).times(TimeSettings(mean=mean, std=std), COUNT, draw()).double()
        which = (t * 1000).round()
        assert (t * 1000 - which).abs().max() < 1e-4
        assert which.min() >= 0
        assert which.max() <= 999
        z = mean + std * torch.randn(COUNT, generator=draw())
        assert torch.equal(which, (z.sigmoid() * 1000).floor().clamp_max(999).double())
        logit = torch.logit((which + 0.5) / 1000).numpy()
        assert stats.kstest((logit - mean) / std, "norm").statistic < 0.015

    def test_an_unknown_prediction_is_refused(self):
        with pytest.raises(PretrainedError) as caught:
            Diffusion(torch.linspace(0.9, 0.1, 10), "trigflow")
        assert str(caught.value) == "prediction_type 'trigflow' is not known; known: epsilon, v_prediction, sample"
        with pytest.raises(PretrainedError, match="prediction_type 'x' is not known"):
            process_of({**SD15, "prediction_type": "x"})


class TestProcessOf:
    """Which process a released pipeline was trained with, by the file of its scheduler."""

    @pytest.mark.parametrize("config, shift", [(SD3, 3.0), (SCHNELL, 1.0), (FLUX, 1.0), (SANA, 3.0)])
    def test_flow_matching_and_its_static_shift(self, config, shift):
        assert process_of(config) == Flow(shift, LOGIT_NORMAL)
        assert process_of(json.loads(json.dumps(config))) == Flow(shift, LOGIT_NORMAL)

    def test_heuns_flow_and_one_without_a_shift(self):
        assert process_of({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.0}) == Flow(2.0, LOGIT_NORMAL)
        assert process_of({"_class_name": "FlowMatchEulerDiscreteScheduler"}) == Flow(1.0, LOGIT_NORMAL)
        unipc = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}
        assert process_of(unipc) == Flow(5.0, LOGIT_NORMAL)

    @pytest.mark.parametrize("config, prediction", [
        (SD15, "epsilon"), (SD21, "v_prediction"), (SDXL, "epsilon"), (KOLORS, "epsilon"), (PIXART, "epsilon"),
        (HUNYUAN_DIT, "v_prediction"), (COSINE, "sample"),
    ], ids=["sd15", "sd21", "sdxl", "kolors", "pixart", "hunyuan_dit", "cosine"])  # fmt: skip
    def test_diffusion_by_its_betas_and_its_prediction(self, config, prediction):
        process = process_of(config)
        assert isinstance(process, Diffusion)
        x, noise = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), -2.0)
        noisy, target = process.corrupt(x, noise, torch.tensor([0.6]))
        a = alphas(config)[600]
        assert noisy.item() == pytest.approx(3 * a**0.5 - 2 * (1 - a) ** 0.5, abs=of_products(x - noise, 1000))
        wanted = {"epsilon": -2.0, "sample": 3.0, "v_prediction": -2 * a**0.5 - 3 * (1 - a) ** 0.5}[prediction]
        assert target.item() == pytest.approx(wanted, abs=of_products(x - noise, 1000))

    def test_betas_that_are_listed_count(self):
        process = process_of({**SD15, "trained_betas": [0.1, 0.2, 0.5]})
        signal, _ = process.corrupt(torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), torch.tensor([0.0, 0.001, 0.002]))
        assert signal.flatten().tolist() == pytest.approx([0.9**0.5, 0.72**0.5, 0.36**0.5])
        assert set(process.times(None, 100, draw()).mul(1000).round().int().tolist()) == {0, 1, 2}

    @pytest.mark.parametrize("config", [{}, PLAYGROUND, {"_class_name": "SomeScheduler", "prediction_type": "sample"}])
    def test_noise_that_is_not_known_is_refused_and_not_taken_for_ddpms(self, config):
        with pytest.raises(PretrainedError) as caught:
            process_of(config)
        assert str(caught.value) == f"the noise of a scheduler of class {config.get('_class_name')} is not known"
