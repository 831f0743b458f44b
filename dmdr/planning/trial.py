"""Try a training stage before anyone pays: one update of it at its real shapes, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from dmdr.draws import Run
from dmdr.state import Row, TrainState
from dmdr.train import train


@dataclass(frozen=True)
class Trial:
    """One update. samples: in its batch, which is smaller than asked for where that would have taken too long.

    whole: seconds that the batch that was asked for takes, measured, or else estimated from the smaller one.
    peak: most bytes of GPU memory; 0 on a CPU.
    """

    samples: int
    seconds: float
    whole: float
    peak: int
    figures: Row


def try_update(run: Run, state: TrainState, *, limit: float) -> Trial:
    """Update student and fake score once with the smallest batch, then with the whole one of `run`.

    The first update warms up. Where it tells that the second would take more than `limit` seconds, it is the only one.

    Raises:
        NonFinite: a loss or a gradient is not a number.
    """
    whole = run.training.batch_size
    first = _try(run, state, samples=1, whole=whole)
    if first.samples == whole or first.whole > limit:
        return first
    return _try(run, state, samples=whole, whole=whole)


def _try(run: Run, state: TrainState, *, samples: int, whole: int) -> Trial:
    training = run.training.model_copy(update={"batch_size": samples})
    on_gpu = run.times.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    rl = None if run.rl is None else run.rl.act_at_once()
    whole_update = replace(run, training=training, watch=None, fake_warmup=0, rl=rl)
    figures = next(train(whole_update, state, stop=lambda: False))
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Trial(samples, seconds, seconds * whole / samples, peak, figures)
