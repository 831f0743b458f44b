"""Times a piece of work on a device: its seconds, those of the CPU beside it, and the memory that it took."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """seconds: of one run, the best of some. host: seconds of the CPU in it. peak, reserved: bytes; 0 on a CPU."""

    seconds: float
    host: float
    peak: int
    reserved: int


@dataclass(frozen=True)
class Target:
    """Where it is measured. tiny: on small networks, each piece of work once: to see that every line runs."""

    device: str
    tiny: bool = False

    def time_work(self, work: Callable[[], object], *, warm: int = 1, repeats: int = 2) -> Timing:
        """The best of `repeats` runs, after `warm` runs that are not timed."""
        for _ in range(0 if self.tiny else warm):
            work()
        self.wait()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs = []
        for _ in range(1 if self.tiny else repeats):
            began, host = time.perf_counter(), time.process_time()
            work()
            host = time.process_time() - host  # before we wait: waiting for a GPU costs a CPU as well
            self.wait()
            runs.append((time.perf_counter() - began, host))
        seconds, host = min(runs)
        if self.device != "cuda":
            return Timing(seconds, host, 0, 0)
        return Timing(seconds, host, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    def wait(self) -> None:
        """Wait until the device has done all that it was asked for."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def release() -> None:
    """Give the memory back of what is no longer in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
