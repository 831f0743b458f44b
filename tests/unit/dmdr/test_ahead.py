"""The thread that gets the next items in advance: the same items, in the same order, whatever was prepared."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from dmdr.errors import StoreError
from dmdr.promptset.ahead import Ahead


class Numbers:
    """Prompts whose item is their index. It notes who asks, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.threads: set[int] = set()
        self.fails = False

    def __len__(self) -> int:
        return 100

    def items(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        self.asked.append(indices)
        self.threads.add(threading.get_ident())
        if self.fails:
            raise StoreError("the store is away")
        return [{"x": torch.tensor([index])} for index in indices]

    def records(self, indices: list[int]) -> list[dict]:
        self.threads.add(threading.get_ident())
        return [{"prompt": str(index)} for index in indices]


def read(prompts: Ahead, indices: list[int]) -> list[int]:
    return [int(item["x"]) for item in prompts.items(indices)]


def test_what_was_prepared_is_given_once() -> None:
    source, rng = Numbers(), random.Random(3)
    prompts = Ahead(source)
    batches = [rng.choices(range(100), k=4) for _ in range(30)]
    for batch, later in zip(batches, [*batches[1:], [0]], strict=True):
        assert read(prompts, batch) == batch
        if rng.random() < 0.7:
            prompts.prepare(later)
        if rng.random() < 0.3:
            other = rng.choices(range(100), k=3)  # as the watch asks for, between two updates
            assert read(prompts, other) == other
        assert prompts.records(batch) == [{"prompt": str(index)} for index in batch]
    assert len(source.threads) == 1 and threading.get_ident() not in source.threads
    assert len(prompts) == 100


def test_what_was_prepared_is_not_got_again() -> None:
    source = Numbers()
    prompts = Ahead(source)
    prompts.prepare([1, 2])
    assert read(prompts, [1, 2]) == [1, 2]
    assert source.asked == [[1, 2]]


def test_an_error_arrives_where_the_items_are_asked_for() -> None:
    source = Numbers()
    prompts, source.fails = Ahead(source), True
    prompts.prepare([1])
    with pytest.raises(StoreError, match="away"):
        prompts.items([1])
    source.fails = False
    assert read(prompts, [1]) == [1]
