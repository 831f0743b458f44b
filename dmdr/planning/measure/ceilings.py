"""What the device itself reaches: the ceilings beside which every other figure stands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from dmdr.planning.measure.clock import Target
from dmdr.planning.measure.table import Line


def measure_ceilings(where: Target) -> Iterator[Line]:
    """The device's name, a product of large matrices in each precision, and a copy of memory."""
    if where.device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        yield Line("device", {"name": facts.name, "GiB": facts.total_memory / 2**30, "torch": torch.__version__})
    else:
        yield Line("device", {"name": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__})
    side = 64 if where.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=where.device, dtype=dtype)
        seconds = where.time_work(partial(torch.matmul, a, a), repeats=5).seconds
        yield Line(f"product of {side} x {side} in {dtype}", {"TFLOP/s": 2 * side**3 / seconds / 1e12})
    source = torch.randn(2**10 if where.tiny else 2**30, device=where.device, dtype=torch.float32)
    copy = torch.empty_like(source)
    seconds = where.time_work(lambda: copy.copy_(source), repeats=5).seconds
    yield Line("copy", {"TB/s": 2 * source.nbytes / seconds / 1e12})
