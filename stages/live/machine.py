"""What a machine tells of itself while a stage runs: memory and utilisation of its GPUs, main memory."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from stages.live.layout import Gpu

EVERY = 15.0  # seconds between two questions to the driver, which take a while
TIMEOUT = 10.0  # seconds for its answer
QUESTION = ("--query-gpu=name,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits")


class Machine:
    """Asks for GPUs at most every EVERY seconds. Its methods are called by a thread that nobody waits for."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._program = shutil.which("nvidia-smi")
        self._asked: float | None = None
        self._gpus: tuple[Gpu, ...] = ()

    def read_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs of this machine; none where the driver's program is missing or does not answer."""
        if self._program is None:
            return ()
        if self._asked is None or self._now() - self._asked >= EVERY:
            self._asked = self._now()
            try:
                answer = subprocess.run(
                    [self._program, *QUESTION], capture_output=True, text=True, timeout=TIMEOUT, check=False
                )
                self._gpus = parse_gpus(answer.stdout) if answer.returncode == 0 else ()
            except (OSError, subprocess.SubprocessError):
                self._gpus = ()
        return self._gpus


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """Read lines such as "NVIDIA H100 80GB HBM3, 61234, 81559, 97". A value that is not a number counts as 0."""
    gpus = []
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4:
            used, total, busy = (float(cell) if cell.replace(".", "", 1).isdecimal() else 0.0 for cell in cells[1:])
            gpus.append(Gpu(name=cells[0], used_mib=used, total_mib=total, busy=busy))
    return tuple(gpus)


def measure_peak_memory() -> float:
    """The most main memory that this process has had, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
