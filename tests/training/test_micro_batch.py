"""How many images go through the denoiser at a time, given or found out, and that it changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from repa_lab.training.trainer import Trainer
from tests.training.conftest import PASS, PLAIN_DESCENT, UNET, make_options, make_run

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
CUTOFF = {"similarity_threshold": 0.99, "similarity_ema_decay": 0.5, "similarity_min_count": 2}
SETTINGS = {
    "train.batch_size": 8,
    "train.weight_decay": 0.1,
    "train.grad_clip": 0.5,
    "train.ema": 0.5,
    "train.steps": 9,
}
UREPA = {**UNET, "regularizer.type": "urepa"}


def full() -> torch.OutOfMemoryError:
    """An error of its own, for its traceback holds what the pass computed."""
    return torch.OutOfMemoryError(*FULL.args)


def in_forward(trainer: Trainer, seen: list[int], is_full: Callable[[int], bool]) -> None:
    def hook(module, inputs, output) -> None:
        seen.append(len(output))
        if is_full(len(output)):
            raise full()

    trainer.state.denoiser.register_forward_hook(hook)


def in_backward(trainer: Trainer, seen: list[int], is_full: Callable[[int], bool]) -> None:
    """Where it happens most: gradients of the last layers are there already."""

    def fail(gradient: torch.Tensor) -> None:
        raise full()

    def hook(module, inputs, output) -> None:
        seen.append(len(output))
        if is_full(len(output)):
            inputs[0].requires_grad_().register_hook(fail)

    trainer.state.denoiser.register_forward_pre_hook(lambda module, inputs: hook(module, inputs, inputs[0]))


def in_regularizer(trainer: Trainer, seen: list[int], is_full: Callable[[int], bool]) -> None:
    """After the similarity was noted."""

    regularizer = trainer.aligner.terms[0].regularizer
    observe = regularizer.observe

    def observe_and_fail(step, loss) -> None:
        observe(step, loss)
        if is_full(seen[-1]):
            raise full()

    regularizer.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0].taps[0].values)))
    regularizer.observe = observe_and_fail


PLACES = [in_forward, in_backward, in_regularizer]
everywhere = pytest.mark.parametrize("settings, place", [*(({}, place) for place in PLACES), (UREPA, in_backward)])


def make(cache, micro_batch, **settings) -> Trainer:
    run = make_run(**{**SETTINGS, "regularizer.schedule": CUTOFF, **settings})
    return Trainer(run, make_options(micro_batch=micro_batch), cache)


def train(trainer: Trainer, steps: int) -> list[dict]:
    batches = trainer.batches()
    return [trainer.step(next(batches)).row() for _ in range(steps)]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    trained = trainer.state
    found = {f"denoiser.{name}": value for name, value in trained.denoiser.state_dict().items()}
    found |= {f"regularizer.{name}": value for name, value in trained.regularizer.state_dict().items()}
    found |= {f"ema.{name}": value for name, value in trained.ema.average.items()}
    for number, entry in trained.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    return found


def assert_same(first: Trainer, second: Trainer) -> None:
    ours, theirs = state(first), state(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert first.progress == second.progress


class TestStep:
    @everywhere
    def test_what_does_not_fit_is_halved_and_trains_as_the_half_does(self, settings, place, cache):
        found, given = make(cache, "auto", **settings), make(cache, 2, **settings)
        seen: list[int] = []
        place(found, seen, lambda images: images > 2)
        rows = train(found, 3)
        assert seen == [8, 4, *[2] * 4, *[2] * 8]
        assert rows == train(given, 3)
        assert rows[0]["grad_norm"] > 0.5  # so that clipping would show a gradient that is counted twice
        assert_same(found, given)

    @everywhere
    def test_gradients_of_parts_that_did_fit_are_taken_once(self, settings, place, cache):
        """Memory runs out in the second half: the first one's gradients are there, and its similarity is noted."""
        found, given = make(cache, "auto", **settings), make(cache, 2, **settings)
        seen: list[int] = []
        place(found, seen, lambda images: images > 4 or seen[-2:] == [4, 4])
        rows = train(found, 2)
        assert seen == [8, 4, 4, *[2] * 4, *[2] * 4]
        assert rows == train(given, 2)
        assert_same(found, given)

    @pytest.mark.parametrize("place", PLACES)
    def test_a_later_step_may_be_the_first_that_does_not_fit(self, place, cache):
        """The similarity of the step before it has been noted and not yet taken in."""
        found, first, rest = (make(cache, micro_batch) for micro_batch in ("auto", None, 4))
        seen: list[int] = []
        place(found, seen, lambda images: images > 4 and len(seen) > 2)
        rows = train(found, 4)
        assert seen == [8, 8, 8, 4, 4, 4, 4]
        assert rows[:2] == train(first, 2)
        rest.state.denoiser.load_state_dict(first.state.denoiser.state_dict())
        rest.state.regularizer.load_state_dict(first.state.regularizer.state_dict())
        rest.state.optimizer.load_state_dict(first.state.optimizer.state_dict())
        rest.state.ema.load({name: value.clone() for name, value in first.state.ema.average.items()})
        rest.progress.step, rest.progress.images = 2, 16
        assert rows[2:] == train(rest, 2)
        assert_same(found, rest)

    def test_it_trains_as_the_whole_batch_does_but_for_rounding(self, cache):
        found, whole = make(cache, "auto", **PLAIN_DESCENT), make(cache, None, **PLAIN_DESCENT)
        in_forward(found, [], lambda images: images > 2)
        for ours, theirs in zip(train(found, 2), train(whole, 2), strict=True):
            assert ours == pytest.approx(theirs, rel=PASS, abs=PASS)
        assert found.aligner.terms[0].regularizer.cutoff.similarity == pytest.approx(
            whole.aligner.terms[0].regularizer.cutoff.similarity, abs=PASS
        )

    @everywhere
    def test_the_failed_passs_tensors_are_free_before_the_cache_is_emptied(self, settings, place, cache, monkeypatch):
        """Or their memory would stay reserved in blocks of the size that did not fit."""
        trainer, outputs, alive = make(cache, "auto", **settings), [], []

        def note(module, inputs, output) -> None:
            if isinstance(output, torch.Tensor):
                outputs.append(StorageWeakRef(output.untyped_storage()))

        def empty_cache() -> None:
            torch.ones(
                (), requires_grad=True
            ).backward()  # on a CPU autograd's queue keeps an interrupted pass until the next
            gradients = [parameter.grad for parameter in trainer.state.ema.live.values() if parameter.grad is not None]
            alive.append((len(outputs), sum(not output.expired() for output in outputs), len(gradients)))
            outputs.clear()

        for module in trainer.state.denoiser.modules():
            module.register_forward_hook(note)
        place(trainer, [], lambda images: images > 2)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
        gc.disable()  # what only a collection of cycles frees is not free in time
        try:
            train(trainer, 1)
        finally:
            gc.enable()
        assert [(kept, gradients) for _, kept, gradients in alive] == [(0, 0), (0, 0)]  # of 8 images, and of 4
        assert min(count for count, _, _ in alive) > 10

    def test_where_all_fits_nothing_is_split(self, cache):
        found, whole = make(cache, "auto"), make(cache, None)
        seen: list[int] = []
        in_forward(found, seen, lambda images: False)
        assert train(found, 2) == train(whole, 2)
        assert seen == [8, 8]
        assert_same(found, whole)

    def test_the_similarity_counts_a_step_that_was_retried_once(self, cache):
        found, given = make(cache, "auto"), make(cache, 2)
        in_regularizer(found, [], lambda images: images > 2)
        rows = train(found, 3)
        train(given, 3)
        ours, theirs = (one.aligner.terms[0].regularizer.cutoff.get_extra_state() for one in (found, given))
        assert torch.equal(ours, theirs)
        assert ours[1].item() == 3
        # By hand: with a decay of 1/2 the mean of three steps has weights 1/7, 2/7 and 4/7.
        cosines = [row["align/cosine"] for row in rows]
        expected = (cosines[0] + 2 * cosines[1] + 4 * cosines[2]) / 7
        assert found.aligner.terms[0].regularizer.cutoff.similarity == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        ("place", "sizes"), [*((place, [8, 4, 2, 1]) for place in PLACES), (in_forward, [7, 3, 1]), (in_forward, [1])]
    )
    def test_a_single_image_that_does_not_fit_ends_the_run(self, place, sizes, cache):
        trainer = make(cache, "auto", **{"train.batch_size": sizes[0]})
        seen: list[int] = []
        place(trainer, seen, lambda images: True)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            train(trainer, 1)
        assert seen == sizes
        assert trainer.progress.step == 0

    @pytest.mark.parametrize("micro_batch", [None, 4])
    def test_a_size_that_was_given_is_not_changed(self, micro_batch, cache):
        trainer = make(cache, micro_batch)
        seen: list[int] = []
        in_forward(trainer, seen, lambda images: images > 2)
        with pytest.raises(torch.OutOfMemoryError):
            train(trainer, 1)
        assert seen == [micro_batch or 8]
