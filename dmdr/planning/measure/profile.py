"""Where the time of one part of the fake score goes, by torch's profiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from dmdr.planning.measure.cases import Shape, Stage
from dmdr.planning.measure.clock import Target
from dmdr.planning.measure.table import Line

WORDS = {  # of kernels' and operators' names, the first that fits
    "attention": ("flash", "fmha", "attention", "softmax"),
    "product": ("gemm", "cutlass", "cublas", "xmma", "::mm", "addmm", "bmm", "nvjet", "linear"),
    "convolution": ("conv", "winograd", "implicit"),
    "cast or copy": ("copy", "cast", "memcpy", "::to"),
}
SHAPE = Shape("SD3-Medium", 1024, 4, True)


def profile_fake_score(target: Target) -> Iterator[Line]:
    """Shares of the time by kind of kernel, the launches, and the calls that wait for the GPU."""
    stage = Stage(SHAPE.shrink() if target.tiny else SHAPE, target.device)
    stage.roll_out()
    wall = target.time_work(stage.update_fake_score).seconds
    on_gpu = target.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        stage.update_fake_score()
        target.wait()
    events = profiler.key_averages()
    seconds = dict.fromkeys((*WORDS, "elementwise"), 0.0)
    launches = 0
    for event in events:
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        seconds[find_kind(event.key)] += took / 1e6
        launches += event.count if took else 0
    busy = sum(seconds.values())
    shares = {f"{kind} share": each / busy for kind, each in seconds.items()}
    figures = {"s": wall, "busy share": min(1.0, busy / wall), **shares, "launches": launches}
    if on_gpu:
        figures["calls that wait"] = count_waits(stage)
    yield Line(f"profile of the fake score, {stage.shape.name}", {**figures})


def find_kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, words in WORDS.items() if any(word in lowered for word in words)), "elementwise")


def count_waits(stage: Stage) -> int:
    """How often an update of the fake score waits for the GPU, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stage.update_fake_score()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)
