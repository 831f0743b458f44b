"""An update of published shapes on the device, its parts timed, beside what the planner says of the same config."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dmdr.planning.gpus import GIB, GPUS, Gpu
from dmdr.planning.measure.cases import SHARE, K, Shape, Stage, build_config
from dmdr.planning.measure.clock import Target, Timing, release
from dmdr.planning.measure.table import Figures, Line
from dmdr.planning.plan import plan_stage
from dmdr.planning.roofline import compute_mfu, estimate_update
from dmdr.planning.stage_plan import StagePlan
from dmdr.train import training_step

SHAPES = (
    Shape("SD3-Medium", 1024, 4, True),
    Shape("SD3-Medium", 1024, 2, False),
    Shape("SD3-Medium", 512, 4, False),
    Shape("SD3.5-Large", 1024, 1, True),
    Shape("SD3.5-Large", 1024, 2, True),
    Shape("SDXL", 1024, 4, True),
)
WHOLE = SHAPES[0]


def find_gpu(name: str) -> Gpu | None:
    """The GPU of the planner's table that torch calls so; None if it is not there."""
    words = {"H100": "h100-80", "H200": "h200", "B200": "b200", "L40S": "l40s", "A10G": "a10g", "4090": "rtx-4090"}
    words |= {"3090": "rtx-3090", "5090": "rtx-5090", "L4": "l4"}
    words |= {"A100-SXM4-40GB": "a100-40", "A100-PCIE-40GB": "a100-40", "A100": "a100-80"}
    return next((GPUS[key] for word, key in words.items() if word in name), None)


def time_parts(shape: Shape, target: Target) -> dict[str, Timing]:
    """The parts of an update of one part of a batch, each timed."""
    stage = Stage(shape, target.device)
    return {
        "rollout": target.time_work(stage.roll_out),
        "fake score": target.time_work(stage.update_fake_score),
        "student": target.time_work(lambda: stage.update_student(rewarded=False)),
        "student with reward": target.time_work(lambda: stage.update_student(rewarded=True)),
    }


def sum_parts(parts: dict[str, Timing], shape: Shape) -> dict[str, float]:
    """Seconds of a whole joint update of SHARE samples, by its parts, and together."""
    times = SHARE / shape.micro
    seconds = {
        "rollout s": times * parts["rollout"].seconds,
        "fake score s": times * (K - 1) * parts["fake score"].seconds,
        "student s": times * parts["student"].seconds,
        "reward s": times * (parts["student with reward"].seconds - parts["student"].seconds),
    }
    return {"update s": sum(seconds.values()), **seconds}


def measure_shape(shape: Shape, target: Target, gpu: Gpu | None) -> Line:
    """One shape: seconds of an update, its FLOPs, its memory, and the planner's figures beside them."""
    parts = time_parts(shape, target)
    seconds = sum_parts(parts, shape)
    kept = (parts["rollout"], parts["student with reward"])
    host = SHARE / shape.micro * (sum(each.host for each in kept) + (K - 1) * parts["fake score"].host)
    peak, reserved = (
        max(sizes) for sizes in zip(*((each.peak, each.reserved) for each in parts.values()), strict=True)
    )
    figures: Figures = {**seconds, "host s": host, "peak GiB": peak / GIB, "reserved GiB": reserved / GIB}
    if not shape.tiny:
        plan = plan_stage(build_config(shape, batch=SHARE, published=True), "joint")
        figures |= compare_with_plan(plan, gpu, shape, seconds=seconds["update s"], peak=peak)
    return Line(shape.name, figures)


def compare_with_plan(plan: StagePlan, gpu: Gpu | None, shape: Shape, *, seconds: float, peak: int) -> Figures:
    """The plan's FLOPs and memory, the shares of the GPU's data sheet that are reached, and the plan's time.

    seconds: of an update, measured. peak: bytes, measured; 0 on a CPU. gpu: None if the planner does not know it.
    """
    figures: Figures = {"TFLOP needed": plan.needed / 1e12, "TFLOP executed": plan.flops / 1e12}
    figures["planned GiB"] = plan.peak / GIB
    if peak:
        figures["planned / peak"] = plan.peak / peak
    if gpu is not None:
        model, executed = compute_mfu(plan, seconds, gpu, shape.precision)
        planned = estimate_update(plan, gpu).seconds
        figures |= {"MFU": model, "executed": executed, "planned s": planned, "planned / s": planned / seconds}
    return figures


def measure_shapes(target: Target, gpu: Gpu | None) -> Iterator[Line]:
    """Every shape; one that does not fit into the memory says so."""
    for shape in dict.fromkeys(each.shrink() for each in SHAPES) if target.tiny else SHAPES:
        try:
            yield measure_shape(shape, target, gpu)
        except torch.OutOfMemoryError as error:
            yield Line(shape.name, note=f"out of memory: {str(error).splitlines()[0]}")
        release()


def measure_whole_update(target: Target) -> Iterator[Line]:
    """A whole joint update of SHARE samples from end to end, beside the sum of its parts."""
    shape = WHOLE.shrink() if target.tiny else WHOLE
    expected = sum_parts(time_parts(shape, target), shape)["update s"]
    release()
    stage = Stage(shape, target.device, batch=SHARE)
    seconds = target.time_work(lambda: training_step(stage.run, stage.state), repeats=1).seconds
    yield Line(
        f"a whole update, {shape.name}", {"s": seconds, "sum of parts s": expected, "apart": seconds / expected - 1}
    )
