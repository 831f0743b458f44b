"""Our update beside those of three other code bases, on the same network."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dmdr.planning.measure.cases import STEPS, TINY_RESOLUTION, K, Shape, build_teacher, draw_item
from dmdr.planning.measure.clock import Target, release
from dmdr.planning.measure.table import Line
from dmdr.planning.structures import STRUCTURES, Case, build_updates


def measure_rivals(target: Target) -> Iterator[Line]:
    """SD3-Medium at two sizes, batches of 4, LoRAs of rank 32 and 64, without a reward."""
    for resolution in (TINY_RESOLUTION,) if target.tiny else (512, 1024):
        shape = Shape("SD3-Medium", resolution, 1 if target.tiny else 4, recompute=resolution > 512, tiny=target.tiny)
        backbone = build_teacher(shape, target.device)
        backbone.compute = torch.bfloat16
        case = Case(
            backbone,
            draw_item(backbone),
            batch=shape.micro,
            steps=2 if target.tiny else STEPS,
            k=1 if target.tiny else K,
            fake_rank=32,
            student_rank=64,
        )
        if shape.recompute:
            case.base.recompute_activations("all")
        ours = 0.0
        for name in STRUCTURES:
            updates = build_updates(case, name)
            timings = [target.time_work(update, repeats=1) for update in updates]
            seconds = sum(each.seconds for each in timings) / len(timings)
            ours = ours or seconds  # ours is the first
            peak = max(each.peak for each in timings) / 2**30
            yield Line(
                f"{name}, SD3-Medium {resolution} px",
                {"update s": seconds, "of ours": seconds / ours, "peak GiB": peak},
            )
        del case, backbone
        release()
