"""Times are of warm models, from batches of one size, with their spread."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stages.evaluation import timing
from stages.evaluation.batch import Batch
from stages.evaluation.timing import REPEATS, DrawingTime, Stopwatch, summarize


class SlowModel:
    """Draws an image in 1/1024 s of a clock of its own, but the first batch takes 1 s more. batches: of what sizes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.now = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.now += len(batch.prompts) / 1024 + (0.0 if self.batches else 1.0)
        self.batches.append(len(batch.prompts))
        return torch.zeros(len(batch.prompts), 3, 1, 1)


def batch_of(size: int) -> Batch:
    return Batch([""] * size, (), torch.zeros(0), [])


def test_the_first_batch_and_small_ones_do_not_count(monkeypatch: pytest.MonkeyPatch):
    stopwatch, model = Stopwatch(), SlowModel(monkeypatch)
    for size in (8, 8, 8, 8, 2):
        stopwatch.draw(model, batch_of(size))
    stopwatch.repeat(lambda: pytest.fail("three batches were counted"))
    counted = stopwatch.take()
    assert counted == [1 / 1024] * 3, "seconds an image"
    assert stopwatch.take() == []


def test_a_single_batch_is_drawn_again_until_its_time_is_known(monkeypatch: pytest.MonkeyPatch):
    stopwatch, model = Stopwatch(), SlowModel(monkeypatch)
    stopwatch.draw(model, batch_of(8))
    stopwatch.draw(model, batch_of(2))  # smaller, so no measure
    stopwatch.repeat(lambda: stopwatch.draw(model, batch_of(8)))
    assert model.batches == [8, 2] + [8] * REPEATS
    assert len(stopwatch.take()) == REPEATS


def test_repeating_a_batch_that_never_counts_ends(monkeypatch: pytest.MonkeyPatch):
    stopwatch, model = Stopwatch(), SlowModel(monkeypatch)
    for size in (8, 8):
        stopwatch.draw(model, batch_of(size))
    stopwatch.repeat(lambda: stopwatch.draw(model, batch_of(2)))
    assert len(model.batches) == 2 + REPEATS and len(stopwatch.take()) == 1


def test_a_long_batch_counts_at_once_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "LONG", 0.5)
    stopwatch, model = Stopwatch(), SlowModel(monkeypatch)
    stopwatch.draw(model, batch_of(4))
    stopwatch.repeat(lambda: pytest.fail("it takes too long"))
    assert len(stopwatch.take()) == 1


def test_all_shards_of_a_model_give_one_median_and_its_spread():
    shards = [DrawingTime(seconds=9, images=4, batches=[1.0, 3.0]), DrawingTime(seconds=9, images=4, batches=[2.0])]
    seconds, spread = summarize(shards)
    assert (seconds, spread.least, spread.greatest, spread.batches) == (2.0, 1.0, 3.0, 3)
    earlier = [DrawingTime(seconds=9, images=4), DrawingTime(seconds=3, images=2)]
    assert summarize(earlier) == (2.0, None)
