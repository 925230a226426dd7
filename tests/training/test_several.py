"""Several regularizers in one run, and the signals that only some of them ask for, in real training steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from repa_lab.align import Loss, Needs, Regularizer, RegularizerSettings, Signals
from repa_lab.align.needs import FrozenModel
from repa_lab.align.settings import REGULARIZERS, regularizer
from repa_lab.models.released import PretrainedError
from repa_lab.training.batches import Batch, generator
from repa_lab.training.trainer import Trainer
from tests.rounding import SIT, rounding
from tests.training.conftest import ENCODER, OFF, PASS, PLAIN_DESCENT, make_options, make_run

REPA: dict[str, Any] = {"type": "repa", "encoder": ENCODER, "projector": {"width": 16}}
WATCH: dict[str, Any] = {"type": "watch"}


class Watch(Regularizer):
    """Asks for what its settings name, keeps what it is given, and adds nothing."""

    seen: ClassVar[list[Signals]] = []

    class Settings(RegularizerSettings):
        attention: tuple[int, ...] = ()
        ema_taps: tuple[int, ...] = ()
        less_noise: float = 0.0
        token_times: float = 0.0
        frozen_taps: tuple[int, ...] = ()
        weights: str | None = None
        guidance: float = 1.0

    @classmethod
    def needs(cls, settings) -> Needs:
        return Needs(
            taps=(settings.block_index,),
            ema_taps=settings.ema_taps,
            attention=settings.attention,
            less_noise=settings.less_noise,
            token_times=settings.token_times,
            frozen_taps=settings.frozen_taps,
            frozen=FrozenModel(settings.weights, settings.guidance),
            prediction=True,
        )

    def forward(self, signals: Signals, step: int) -> Loss:
        self.seen.append(signals)
        return Loss(0 * signals.taps[0].values.float().mean())


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    regularizer("watch")(Watch)
    Watch.seen.clear()
    yield
    REGULARIZERS.drop(__file__)


def trainer_of(cache, given: Any, options: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    """A trainer whose denoiser has random weights: a fresh one predicts 0, and its blocks pass on what they are given."""
    trainer = Trainer(make_run(**{"regularizer": given, **settings}), make_options(**(options or {})), cache)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.denoiser.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return trainer


def bare(denoiser: nn.Module) -> nn.Module:
    """A copy of a denoiser as it is now, without the hooks that were set on it."""
    copied = copy.deepcopy(denoiser)
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def block_output(denoiser: nn.Module, block: int, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    captured: list[torch.Tensor] = []
    handle = denoiser.blocks[block].register_forward_hook(lambda module, inputs, output: captured.append(output))
    with torch.no_grad():
        denoiser(x_t, t, y)
    handle.remove()
    return captured[0]


def noisy(batch: Batch, t: torch.Tensor) -> torch.Tensor:
    time = t.view(-1, 1, 1, 1) if t.ndim == 1 else t
    return (1 - time) * batch.x + time * batch.noise


def trained(trainer: Trainer, steps: int = 3) -> dict[str, torch.Tensor]:
    for batch in list(trainer.batches())[:steps]:
        trainer.step(batch)
    return trainer.model.denoiser.state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], value) for name, value in right.items())


class TestSeveral:
    def test_a_list_of_one_and_none_in_a_list_are_bit_identical_to_a_section(self, cache):
        section = trained(trainer_of(cache, REPA))
        assert same(section, trained(trainer_of(cache, [REPA])))
        assert same(section, trained(trainer_of(cache, [{"type": "none"}, REPA])))
        assert not same(section, trained(trainer_of(cache, [REPA, {"type": "layersync"}])))
        off = trained(trainer_of(cache, OFF["regularizer"]))
        assert same(off, trained(trainer_of(cache, [{"type": "none"}, {"type": "none"}])))
        assert same(off, trained(trainer_of(cache, [{**REPA, "weight": 0.0}, {"type": "layersync", "weight": 0.0}])))

    def test_at_weight_0_a_member_changes_nothing(self, cache):
        section = trained(trainer_of(cache, REPA))
        assert same(section, trained(trainer_of(cache, [REPA, {"type": "dispersive", "weight": 0.0}])))

    def test_the_step_is_the_sum_of_the_weighted_losses(self, cache):
        given = [{**REPA, "weight": 0.5}, {"type": "dispersive", "weight": 0.25, "schedule": {"warmup_steps": 4}}]
        trainer = trainer_of(cache, given)
        alone = [trainer_of(cache, one).step(next(trainer_of(cache, one).batches())) for one in (REPA,)]
        batches = list(trainer.batches())
        rows = [trainer.step(batch).row() for batch in batches[:2]]
        assert rows[0]["align/repa/loss"] == pytest.approx(alone[0].row()["loss/aligned"] / 0.5, rel=1e-5)
        assert "align/dispersive/distance" not in rows[0]  # its weight is 0 in the first step
        first, second = rows
        assert (first["align/repa/weight"], first["align/dispersive/weight"]) == (0.5, 0.0)
        assert second["align/dispersive/weight"] == 0.0625
        weighted = 0.5 * second["align/repa/loss"] + 0.0625 * second["align/dispersive/loss"]
        assert second["loss/aligned"] == pytest.approx(weighted, rel=1e-5)
        assert second["loss/total"] == pytest.approx(second["loss/denoise"] + weighted, rel=1e-5)
        assert not any(name in second for name in ("align/cosine", "align/weight"))

    def test_a_name_is_what_the_log_says(self, cache):
        trainer = trainer_of(cache, [REPA, {**REPA, "name": "late", "block_index": 3}])
        row = trainer.step(next(trainer.batches())).row()
        assert {"align/repa/cosine", "align/late/cosine", "align/late/weight"} <= row.keys()

    def test_an_encoder_and_a_tap_that_two_ask_for_are_had_once(self, cache, monkeypatch):
        opened, asked = [], []
        from repa_lab.training import aligner as module

        real = module.open_targets

        def counting(encoder, *arguments, **options):
            targets = real(encoder, *arguments, **options)
            opened.append(encoder.name)
            call = targets.__call__

            class Counting:
                dim, reader = targets.dim, targets.reader

                def __call__(self, *arguments):
                    asked.append(encoder.name)
                    return call(*arguments)

            return Counting()

        monkeypatch.setattr(module, "open_targets", counting)
        relation = {"type": "relation", "encoder": ENCODER, "projector": {"width": 16}}
        trainer = trainer_of(cache, [REPA, relation])
        trainer.step(next(trainer.batches()))
        assert (opened, asked) == (["efficientnet_lite0"], ["efficientnet_lite0"])
        assert list(trainer.aligner.taps) == [1]

    def test_a_member_that_has_ended_asks_its_encoder_no_more(self, cache):
        ended = {"type": "relation", "encoder": {**ENCODER, "image_size": 64}, "schedule": {"cutoff_step": 1}}
        trainer = trainer_of(cache, [REPA, ended])
        rows = [trainer.step(batch).row() for batch in list(trainer.batches())[:2]]
        assert ["align/relation/relation" in row for row in rows] == [True, False]
        assert [term.regularizer.settings.type for term in trainer.aligner.active(1)] == ["repa"]

    def test_a_checkpoint_has_all_of_them(self, cache, tmp_path):
        given = [REPA, {"type": "sra2", "projector": {"width": 16}}]
        first = trainer_of(cache, given)
        batches = list(first.batches())
        for batch in batches[:2]:
            first.step(batch)
        first.save(tmp_path)
        second = trainer_of(cache, given)
        second.resume(tmp_path)
        for trainer in (first, second):
            trainer.step(batches[2])
        assert same(first.model.denoiser.state_dict(), second.model.denoiser.state_dict())
        assert same(first.aligner.module.state_dict(), second.aligner.module.state_dict())


class TestSignals:
    def test_queries_and_keys_give_the_blocks_own_attention(self, cache):
        trainer = trainer_of(cache, {**WATCH, "attention": [2, 0]})
        batch = next(trainer.batches())
        before = bare(trainer.model.denoiser)
        trainer.step(batch)
        (signals,) = Watch.seen
        for attention, block in zip(signals.attention, (2, 0), strict=True):
            assert (attention.grid, attention.query.shape, attention.key.shape) == (
                (4, 4),
                (6, 4, 16, 16),
                (6, 4, 16, 16),
            )
            assert attention.query.requires_grad
            layer, calls = before.blocks[block].attn, []
            handle = layer.register_forward_hook(lambda *call, calls=calls: calls.append(call))
            with torch.no_grad():
                before(noisy(batch, batch.t), batch.t, batch.condition["y"])
            handle.remove()
            ((_, (x,), output),) = calls
            value = layer.qkv(x).view(6, 16, 3, 4, 16)[:, :, 2].transpose(1, 2)
            by_hand = layer.proj((attention.logits().softmax(-1) @ value).transpose(1, 2).flatten(2))
            torch.testing.assert_close(by_hand, output, rtol=0, atol=rounding(value.detach(), (4, 64)))

    def test_the_averaged_model_sees_less_noise(self, cache):
        trainer = trainer_of(cache, {**WATCH, "ema_taps": [3], "less_noise": 0.2}, **{"train.ema": 0.0})
        for step, batch in enumerate(list(trainer.batches())[:2]):
            average = bare(trainer.model.denoiser)
            average.load_state_dict(average.state_dict() | trainer.state.ema.of("denoiser."))
            trainer.step(batch)
            draw = torch.rand(6, generator=generator(0, "less_noise", 6 * step))
            t = (batch.t - 0.2 * draw).clamp_min(0)
            assert (t < batch.t).all()
            expected = block_output(average, 3, noisy(batch, t), t, batch.condition["y"])
            assert torch.equal(Watch.seen[-1].ema_taps[0].values, expected)
            assert not Watch.seen[-1].ema_taps[0].values.requires_grad
            assert torch.equal(Watch.seen[-1].times, batch.t)

    def test_two_that_need_different_noise_have_a_pass_each_and_equal_ones_share(self, cache):
        passes = []
        members = [
            {**WATCH, "name": "one", "ema_taps": [3], "less_noise": 0.2},
            {**WATCH, "name": "two", "ema_taps": [2], "less_noise": 0.2},
            {**WATCH, "name": "three", "ema_taps": [3]},
        ]
        trainer = trainer_of(cache, members, **{"train.ema": 0.0})
        trainer.model.denoiser.register_forward_hook(lambda module, inputs, output: passes.append(inputs[1]))
        batch = next(trainer.batches())
        trainer.step(batch)
        assert len(passes) == 3  # two of the averaged model, and the denoiser's own
        assert [torch.equal(t, batch.t) for t in passes] == [False, True, True]
        one, _, three = Watch.seen
        assert not torch.equal(one.ema_taps[0].values, three.ema_taps[0].values)

    def test_token_times(self, cache):
        trainer = trainer_of(cache, {**WATCH, "ema_taps": [3], "token_times": 0.25}, **{"train.ema": 0.0})
        batch = next(trainer.batches())
        before = bare(trainer.model.denoiser)
        average = bare(trainer.model.denoiser)
        average.load_state_dict(average.state_dict() | trainer.state.ema.of("denoiser."))
        trainer.step(batch)
        second = torch.rand(6, generator=generator(0, "second_time", 0))
        mask = torch.rand((6, 1, 4, 4), generator=generator(0, "token_mask", 0)) < 0.25
        times = torch.where(mask, second.view(-1, 1, 1, 1), batch.t.view(-1, 1, 1, 1))
        (signals,) = Watch.seen
        assert torch.equal(signals.times, times)
        pixels = times.repeat_interleave(2, 2).repeat_interleave(2, 3)
        with torch.no_grad():
            output = before(noisy(batch, pixels), times, batch.condition["y"])
        assert torch.equal(signals.prediction.output.detach(), output)
        cleaner = torch.minimum(batch.t, second)
        expected = block_output(average, 3, noisy(batch, cleaner), cleaner, batch.condition["y"])
        assert torch.equal(signals.ema_taps[0].values, expected)

    def test_one_time_for_all_tokens_is_the_same_as_a_time_for_each(self, cache):
        denoiser = bare(trainer_of(cache, OFF["regularizer"]).model.denoiser)
        x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 9])
        with torch.no_grad():
            each = denoiser(x, t.view(-1, 1, 1, 1).expand(-1, -1, 4, 4), y)
        expected = denoiser(x, t, y)
        torch.testing.assert_close(each, expected, rtol=0, atol=rounding(expected, SIT))

    def test_what_is_drawn_for_it_changes_nothing_else(self, cache):
        plain = trained(trainer_of(cache, {**WATCH, "weight": 1.0}))
        much = {**WATCH, "ema_taps": [3], "less_noise": 0.2, "attention": [0], "frozen_taps": [2]}
        assert same(plain, trained(trainer_of(cache, much)))
        off = {**WATCH, "ema_taps": [3], "token_times": 0.5, "weight": 0.0}
        assert same(trained(trainer_of(cache, OFF["regularizer"])), trained(trainer_of(cache, off)))

    def test_micro_batches_have_their_own_draws(self, cache):
        whole = trainer_of(cache, {**WATCH, "token_times": 0.5})
        batch = next(whole.batches())
        whole.step(batch)
        parts = trainer_of(cache, {**WATCH, "token_times": 0.5}, {"micro_batch": 4})
        parts.step(batch)
        once, *twice = Watch.seen
        assert torch.equal(torch.cat([signals.times for signals in twice]), once.times)

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_a_frozen_model_keeps_its_weights_and_is_guided(self, cache, tmp_path, guidance):
        teacher = bare(trainer_of(cache, OFF["regularizer"]).model.denoiser)
        file = tmp_path / "model.safetensors"
        save_file({name: 2 * value for name, value in teacher.state_dict().items()}, file)
        teacher.load_state_dict({name: 2 * value for name, value in teacher.state_dict().items()})
        asked = {**WATCH, "frozen_taps": [2], "weights": str(file), "guidance": guidance}
        trainer = trainer_of(cache, asked, **{"train.lr": 0.1})
        teacher.pos_embed.data.copy_(trainer.model.denoiser.pos_embed)  # fixed, so not among the weights
        for batch in list(trainer.batches())[:2]:
            trainer.step(batch)
            x_t, y = noisy(batch, batch.t), batch.condition["y"]
            conditional = block_output(teacher, 2, x_t, batch.t, y)
            null = block_output(teacher, 2, x_t, batch.t, torch.full_like(y, 10))
            expected = conditional if guidance == 1 else null + guidance * (conditional - null)
            # The guided difference of two passes is off by as much as both.
            error = (2 * guidance - 1) * rounding(conditional, SIT)
            torch.testing.assert_close(Watch.seen[-1].frozen_taps[0].values, expected, rtol=0, atol=error)

    def test_the_weights_of_another_model_are_refused(self, cache, tmp_path):
        file = tmp_path / "model.safetensors"
        save_file({"other": torch.zeros(1)}, file)
        with pytest.raises(PretrainedError, match="has the weights of another model: "):
            trainer_of(cache, {**WATCH, "frozen_taps": [2], "weights": str(file)})
        with pytest.raises(PretrainedError, match="cannot read the weights of "):
            trainer_of(cache, {**WATCH, "frozen_taps": [2], "weights": str(tmp_path / "none.safetensors")})

    HASTE: ClassVar[dict[str, Any]] = {
        **REPA,
        "type": "haste",
        "encoder": {"name": "tiny-dinov2_vits14", "image_size": 56, "cache": False},
        "schedule": {"cutoff_step": 2},
    }

    def test_an_encoder_teaches_its_attention_until_it_is_dismissed(self, cache):
        trainer = trainer_of(cache, self.HASTE)
        (targets,), calls = trainer.aligner.targets.values(), []
        targets._encoder.register_forward_hook(lambda module, inputs, output: calls.append(output.grid))
        rows = [trainer.step(batch).row() for batch in list(trainer.batches())[:3]]
        assert calls == [(4, 4)] * 2
        assert ["align/attention" in row for row in rows] == [True, True, False]
        total = rows[0]["align/attention"] - rows[0]["align/cosine"]
        assert rows[0]["loss/aligned"] == pytest.approx(0.5 * total, rel=1e-5)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_attention_of_a_denoiser_that_is_compiled_is_the_same(self, cache, backend, monkeypatch):
        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        settings = {**self.HASTE, "schedule": {}}
        plain, compiled = (trainer_of(cache, settings, {"compile": value}, **PLAIN_DESCENT) for value in (False, True))
        assert compiled.state.denoiser._compiled_call_impl is not None
        for batch in list(plain.batches())[:3]:
            expected, found = plain.step(batch).row(), compiled.step(batch).row()
            assert found["align/attention"] > 0
            assert found == pytest.approx(expected, rel=PASS, abs=PASS)

    def test_the_attention_loss_reaches_the_denoisers_queries(self, cache):
        gradients = []
        for weight in (0.0, 1.0):
            trainer = trainer_of(cache, {**self.HASTE, "attention_weight": weight, "layers": 2})
            trainer.step(next(trainer.batches()))
            gradients.append(trainer.model.denoiser.blocks[1].attn.qkv.weight.detach().clone())
        assert not torch.equal(*gradients)

    @pytest.mark.parametrize("kind", ["layersync", "sra", "self_flow", "sra2", "dispersive"])
    def test_gradient_checkpointing_and_attention_taps_go_together(self, cache, kind):
        given = [{"type": kind}, {**WATCH, "attention": [1]}]
        plain, checkpointed = (
            trained(trainer_of(cache, given, {"gradient_checkpointing": value})) for value in (False, True)
        )
        assert same(plain, checkpointed)
