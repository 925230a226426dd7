"""What a run has cost, for its rows: so that measuring never outweighs training unseen. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa_lab.runs.files import Row
from repa_lab.spec import RunConfig, RunOptions
from repa_lab.training.costs import active_steps, cost_of

if TYPE_CHECKING:
    from repa_lab.training.checkpoint import Progress


def ledger(config: RunConfig, options: RunOptions, progress: Progress) -> Row:
    """Seconds of all measurements up to now and of encoders in the steps, and counted FLOPs of training, of encoders in
    the steps, and of measurements.

    Seconds of training are the row's own, the encoders' among them; of several processes, all seconds are those of the
    first. What caches spare is in nobody's ledger: it was computed once for all runs. Reading them is in the encoders'
    seconds.
    """
    cost, asked = cost_of(config, options), config.train.batch_size * active_steps(config, progress.step)
    return {
        "cost/evaluation_seconds": round(progress.evaluation_seconds, 3),
        "cost/encoder_seconds": round(progress.encoder_seconds, 3),
        "cost/train_flops": progress.images * cost.denoiser_flops + asked * cost.projector_flops,
        "cost/encoder_flops": asked * cost.encoder_flops,
        "cost/evaluation_flops": cost.measuring(config, 0, progress.step),
    }
