"""Checkpoints that a thread writes: what the main thread sees of them, on a store that is slow or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmdr import distributed
from dmdr.errors import StoreError
from stages.store.artifacts import Artifact
from stages.store.checkpoint_writer import CheckpointWriter
from stages.store.folder import Folder
from tests.support.store_bench import IDENTITY, INPUTS, same, state

PATIENCE = 30  # seconds, then a test fails


class SlowFolder(Folder):
    """A store that takes no file before its gate is open, and none at all when its disk is full."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate, self.asked, self.is_full = threading.Event(), threading.Event(), False

    def publish(self, name: str, write: Callable[[Path], object]) -> None:
        self.asked.set()
        assert self.gate.wait(PATIENCE)
        if self.is_full:
            raise StoreError("no space is left")
        super().publish(name, write)


@pytest.fixture
def slow(tmp_path: Path) -> tuple[SlowFolder, CheckpointWriter, Callable[[], object]]:
    """A store, a writer to it, and what another process sees as the newest checkpoint there."""
    artifact = Artifact(str(tmp_path), "r", "joint")
    artifact.claim(IDENTITY, INPUTS)
    artifact.place = SlowFolder(artifact.place.root)
    return (
        artifact.place,
        CheckpointWriter(artifact.checkpoints(2)),
        Artifact(str(tmp_path), "r", "joint").checkpoints(2).newest,
    )


def info(step: int) -> dict[str, object]:
    return {"step": step, "phase": "joint"}


def test_training_goes_on_and_the_checkpoint_is_of_the_moment_when_it_began(slow) -> None:
    place, writer, newest = slow
    tensors = state(1)
    writer.begin(1, tensors, info(1))
    assert place.asked.wait(PATIENCE), "the thread is at work, and we are here"
    for tensor in tensors.values():
        tensor.zero_()  # the next update
    writer.check()
    assert newest() is None, "whole or invisible"
    place.gate.set()
    writer.wait()
    assert same(newest(), 1)
    writer.begin(2, state(2), info(2))
    writer.wait()
    assert same(newest(), 2)


def test_the_next_checkpoint_waits_for_the_one_on_its_way(slow) -> None:
    place, writer, newest = slow
    writer.begin(1, state(1), info(1))
    opener = threading.Timer(0.3, place.gate.set)
    opener.start()
    began_with: list[object] = []

    def then() -> None:
        began_with.append(newest())

    writer.begin(2, state(2), info(2), then=then)
    assert place.gate.is_set()
    assert newest() is not None, "the first is whole"
    writer.wait()
    assert same(newest(), 2)
    assert [same(each, 2) for each in began_with] == [True], "it comes after the manifest"


def test_what_fails_is_raised_once_where_the_main_thread_asks(slow) -> None:
    place, writer, newest = slow
    place.gate.set()
    writer.begin(1, state(1), info(1))
    writer.wait()
    for ask in (lambda: writer.begin(3, state(3), info(3)), writer.wait):
        place.is_full = True
        writer.begin(2, state(2), info(2))
        with pytest.raises(StoreError, match="no space is left"):
            ask()
        place.is_full = False
        writer.check()
        assert same(newest(), 1)
    place.is_full = True
    writer.begin(2, state(2), info(2))
    with pytest.raises(StoreError, match="no space is left"):  # before the next update, whenever that is
        while True:
            writer.check()
    place.is_full = False
    writer.begin(2, state(2), {"loss": float("nan")})
    with pytest.raises(ValueError, match="Out of range float"):
        writer.wait()
    writer.begin(2, state(2), info(2))
    writer.wait()
    assert same(newest(), 2), "it can go on"


def test_who_waits_for_the_writer_waits_for_other_ranks_only_while_it_does() -> None:
    side = distributed.SideGroup()
    assert not distributed.WAIT
    with distributed.WAIT.behind(side):
        assert not distributed.WAIT
        side.waits = True
        assert distributed.WAIT
    assert not distributed.WAIT, "the main thread computes: that its helper waits excuses no standstill"


def test_a_copy_has_the_bits_of_tensors_of_any_layout() -> None:
    from stages.store.checkpoint_writer import Copy

    copy = Copy()
    for shape in ((4, 3, 2), (2, 3, 4)):  # the second time with other shapes
        tensors = {
            "transposed": torch.randn(shape).transpose(0, 2),
            "row": torch.randn(shape)[1],
            "flag": torch.tensor(True),
        }
        copy.take(tensors)
        found = copy.read()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(found[name].is_contiguous() for name in tensors)
        assert {found[name].data_ptr() for name in tensors}.isdisjoint(t.data_ptr() for t in tensors.values())
        copy.free()
