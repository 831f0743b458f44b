"""How long an update takes on a GPU, from its counted operators. No GPU has confirmed it: everything here is estimated.

1. An operator takes the longer of its arithmetic and its memory traffic, at the shares of the data sheet that its kind
   reaches (`dmdr.planning.gpus`), and the GPU needs 2 us to begin it.
2. Operators run one after another, as torch runs them without compiling: nothing is fused, and nothing overlaps.
3. A CPU prepares each operator. Where that takes longer than the GPU works, the update waits for the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.planning.gpus import Gpu
from dmdr.planning.stage_plan import StagePlan
from dmdr.planning.work import Tally, Work

LAUNCH = 2e-6  # seconds in which the GPU begins an operator: published for H100
PREPARE = 12e-6  # seconds of a CPU an operator, idle host: 10 to 15 by estimate, 25 to 28 measured under load
FLOAT32 = 0.8  # of plain float32 that products reach, ours
LAUNCHES = "launches"
HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of one update on each GPU.

    kinds: by kind of operator, and those in which operators begin. parts: by part of the update, as in the plan.
    host: of the CPU, which works beside the GPU.
    """

    kinds: dict[str, float]
    parts: dict[str, float]
    host: float

    @property
    def busy(self) -> float:
        """Seconds that the GPU works."""
        return sum(self.kinds.values())

    @property
    def seconds(self) -> float:
        return max(self.busy, self.host)

    @property
    def waits_for_host(self) -> bool:
        return self.host > self.busy


def estimate_update(plan: StagePlan, gpu: Gpu) -> UpdateTime:
    """The time of one update of a stage, without messages between GPUs."""
    own = {name: tally.scale(1 / plan.ranks) for name, tally in plan.tallies.items()}
    whole = sum(own.values(), start=Tally())
    parts = {name: sum(time_kinds(tally, gpu).values()) for name, tally in own.items()}
    return UpdateTime(time_kinds(whole, gpu), parts, whole.launches * PREPARE)


def estimate_stage(plan: StagePlan, gpu: Gpu) -> float:
    """Seconds of a whole stage. Updates of the fake score alone take as long as their share of an update's work."""
    return estimate_update(plan, gpu).seconds * plan.total / plan.flops


def time_kinds(tally: Tally, gpu: Gpu) -> dict[str, float]:
    """Seconds by kind of operator."""
    seconds: dict[str, float] = {}
    for work, count in tally:
        seconds[work.kind] = seconds.get(work.kind, 0.0) + count * time_operator(work, gpu)
    return {**seconds, LAUNCHES: tally.launches * LAUNCH}


def time_operator(work: Work, gpu: Gpu) -> float:
    """Seconds of one operator, once it has begun."""
    traffic = work.bytes / (gpu.reached.memory * gpu.bandwidth)
    return max(work.flops / find_rate(work, gpu), traffic) if work.flops else traffic


def find_rate(work: Work, gpu: Gpu) -> float:
    """FLOPs a second that a GPU reaches at this kind of operator.

    In float32 torch convolves in TF32, but multiplies matrices without it.
    """
    reached, is_half = gpu.reached, work.dtype in HALF
    if work.kind == "convolution":
        return reached.convolution * (gpu.flops if is_half else gpu.tf32)
    if work.kind == "product":
        return reached.product * gpu.flops if is_half else FLOAT32 * gpu.float32
    if not is_half:
        return reached.float32_attention * gpu.float32
    return gpu.flops * (reached.attention if work.kind == "attention" else reached.attention_backward)


def compute_mfu(plan: StagePlan, seconds: float, gpu: Gpu, precision: str) -> tuple[float, float]:
    """The share of the data sheet's FLOPs that an update of so many seconds needs, and the share that it executes: with
    what is computed twice to save memory."""
    available = seconds * plan.ranks * gpu.rate(precision)
    return plan.needed / available, plan.flops / available
