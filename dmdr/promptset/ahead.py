"""Get the prompts of the next update while this one runs: from a remote store, or from text encoders on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from dmdr.backbones.protocol import Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.promptset.prompts import Prompts

T = TypeVar("T")
LOOK = 1.0  # seconds between two looks at whether the thread is done; they show that the process goes on


class Ahead:
    """Prompts whose next items a thread gets in advance. They are the same items as without it.

    All calls run in that one thread, one after the other, because files and text encoders serve one thread at a time.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._next: tuple[list[int], Future[list[Item]]] | None = None

    def __len__(self) -> int:
        return len(self._prompts)

    def prepare(self, indices: list[int]) -> None:
        """Begin to get these items, which the next call of `items` will ask for."""
        self._next = indices, self._thread.submit(self._prompts.items, indices)

    def items(self, indices: list[int]) -> list[Item]:
        if self._next is not None and self._next[0] == indices:
            future, self._next = self._next[1], None
            return _await(future)
        return self._run(lambda: self._prompts.items(indices))

    def records(self, indices: list[int]) -> list[PromptRecord]:
        return self._run(lambda: self._prompts.records(indices))

    def _run(self, call: Callable[[], T]) -> T:
        return _await(self._thread.submit(call))


def _await(future: Future[T]) -> T:
    while not future.done():
        wait([future], timeout=LOOK)
    return future.result()
