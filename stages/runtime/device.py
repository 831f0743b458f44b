"""Pick the device that a stage computes on, name it, and measure the memory that is free there."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

from dmdr.config.run import Config

CONTAINER = Path("/sys/fs/cgroup")  # of version 2, as this process sees its own group


def pick_device(config: Config) -> str:
    """`execution.device`, where auto is CUDA if there is any."""
    if config.execution.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.execution.device


def name_device(config: Config) -> str:
    """The device's name for a reader, such as NVIDIA H100 80GB HBM3."""
    if pick_device(config) == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return "one thread of a CPU" if threads == 1 else f"{threads} threads of a CPU"


def measure_free_memory(device: str) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine as far as its container may use it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = _read_available()
    limit, used = _read_number(CONTAINER / "memory.max"), _read_number(CONTAINER / "memory.current")
    return free if limit is None or used is None else min(free, limit - used + _read_reclaimable())


def release_memory() -> None:
    """Give back what nobody holds any more, so that the next model finds it free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _read_available() -> int:
    """Bytes that Linux could give out without swapping."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_number(path: Path) -> int | None:
    """The number in a file of the control group; None where there is no such file, or no limit."""
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None


def _read_reclaimable() -> int:
    """Bytes of the container that hold copies of files, which Linux drops when a process asks for memory."""
    with suppress(OSError, ValueError):
        for line in (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0
