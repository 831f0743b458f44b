"""The noise of everything that is drawn: a pure function of a seed and a key, never of history.

1. A resumed or a resharded run draws the same noise, on every device: random numbers are drawn on the CPU.
2. What training draws has a key for each row, a sample of a batch or a trajectory of a rollout. So a rank draws its own
   rows only, and another number of ranks, or a batch in parts, gives each sample the same noise.
3. While a GPU works on one update, a thread draws for the next what this one has drawn, into pinned memory. The numbers
   are the same as without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

Key = tuple[int | str, ...]


def generator_for(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def noise_for(seed: int, *key: int | str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 of `shape`, a pure function of (seed, key)."""
    return torch.randn(shape, generator=generator_for(seed, *key))


def uniforms_for(seed: int, *key: int | str, rows: Sequence[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64: one for each row, a pure function of (seed, key, row)."""
    drawn = [torch.rand((), dtype=torch.float64, generator=generator_for(seed, *key, row)) for row in rows]
    return torch.stack(drawn) if drawn else torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class Draw:
    """Noise that is asked for in each update: of these rows, each of `shape`. key: what comes before and after the
    number of the update in the key of a row."""

    seed: int
    before: Key
    after: Key
    rows: tuple[int, ...]
    shape: tuple[int, ...]


class RowNoise:
    """Draws noise by rows, on a CUDA device one update ahead.

    device: where the noise will be used. ahead: whether a thread draws what the next update will ask for; None: where
    the device is a GPU, beside which the CPU is idle.
    """

    def __init__(self, device: torch.device | str = "cpu", *, ahead: bool | None = None) -> None:
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._pinned = on_gpu
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="noise") if (on_gpu if ahead is None else ahead) else None
        )
        self._next: dict[Draw, tuple[int, Future[torch.Tensor]]] = {}

    def draw(
        self, seed: int, before: Key, update: int, after: Key = (), *, rows: Sequence[int], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Standard normal float32 (rows, *shape) on the CPU: each row a pure function of (seed, before, update, after,
        row). In pinned memory, if it will be used on a GPU; without numbers, on meta."""
        asked = Draw(seed, before, after, tuple(rows), shape)
        if self._thread is None:
            return self._fill(asked, update)
        found, future = self._next.pop(asked, (None, None))
        noise = future.result() if future is not None and found == update else self._fill(asked, update)
        self._next = {each: kept for each, kept in self._next.items() if update <= kept[0] <= update + 1}
        self._next[asked] = update + 1, self._thread.submit(self._fill, asked, update + 1)
        return noise

    def _fill(self, asked: Draw, update: int) -> torch.Tensor:
        if self.device.type == "meta":
            return torch.empty(len(asked.rows), *asked.shape, device="meta")
        noise = torch.empty(len(asked.rows), *asked.shape, pin_memory=self._pinned)
        for place, row in enumerate(asked.rows):
            generator = generator_for(asked.seed, *asked.before, update, *asked.after, row)
            torch.randn(asked.shape, generator=generator, out=noise[place])
        return noise
