"""How long a model takes for an image: of a warm model, from several batches, with their spread.

1. The first batch after loading is not counted: it compiles kernels, fills caches and grows memory.
2. Where fewer than REPEATS others were drawn, one is drawn again, only to be timed, unless it takes LONG.
3. A batch that takes LONG is counted in any case: warming up is a small part of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel

from dmdr.metrics.scorecard import Spread
from stages.evaluation.batch import Batch, Sampler

REPEATS = 3  # batches that are timed, at least
LONG = 20.0  # seconds


class DrawingTime(BaseModel):
    """What is stored beside a shard of images. seconds: for all of its `images`, whatever was done between them.

    batches: seconds an image of each counted batch; earlier versions stored none.
    """

    seconds: float
    images: int
    batches: list[float] = []


class Stopwatch:
    """Times the batches of one model in one process."""

    def __init__(self) -> None:
        self._is_warm, self._is_long = False, False
        self._size, self._total, self._seconds = 0, 0, list[float]()

    def draw(self, sampler: Sampler, batch: Batch) -> torch.Tensor:
        """Draw a batch: images (B, 3, H, W) in [0, 1], on the CPU."""
        began = time.monotonic()
        images = sampler(batch).float().cpu()  # which waits for a GPU
        self._count(time.monotonic() - began, len(images))
        return images

    def _count(self, seconds: float, size: int) -> None:
        """Only batches of the largest size count: an image of a small one takes longer."""
        self._is_long = self._is_long or seconds >= LONG
        if (self._is_warm or seconds >= LONG) and size >= self._size:
            if size > self._size:
                self._size, self._total, self._seconds = size, 0, []
            self._total += 1
            self._seconds.append(seconds / size)
        self._is_warm = True

    def repeat(self, draw: Callable[[], object]) -> None:
        """Draw a batch again, until enough were counted. draw: draws one of the largest size, with this stopwatch."""
        for _ in range(REPEATS):
            if self._total >= REPEATS or self._is_long:
                return
            draw()

    def take(self) -> list[float]:
        """Seconds an image of the batches that were counted since the last call."""
        taken, self._seconds = self._seconds, []
        return taken


def summarize(times: Sequence[DrawingTime]) -> tuple[float, Spread | None]:
    """Seconds an image over all shards of a model, and their spread; None where an earlier version drew them."""
    batches = [seconds for each in times for seconds in each.batches]
    if not batches:
        return sum(each.seconds for each in times) / sum(each.images for each in times), None
    return statistics.median(batches), Spread(least=min(batches), greatest=max(batches), batches=len(batches))
