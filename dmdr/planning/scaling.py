"""What more machines bring: time, memory and efficiency of an update, each GPU with the same share of a larger batch.

Everything here is estimated. Messages within a machine go over its links, others over the network, as in `gpus.py`.
1. Messages of weights (FSDP) overlap with the networks' work. Sums of gradients wait for it, as the code does.
2. Each process draws noise and reads prompts for its own samples, one update ahead of the networks. So this costs time
   only where it takes longer than they do, on any number of machines.
3. Checkpoints, and processes that wait for the slowest one, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.planning.gpus import Gpu
from dmdr.planning.roofline import estimate_update
from dmdr.planning.stage_plan import StagePlan

DRAW = 1.6e-9  # seconds of a CPU a byte of noise: 0.44 s for a rollout of 64 images of 1,024 pixels, measured
READ = 1.2e9  # bytes of conditioning a second that are read, joined and copied: 0.3 s for 64 prompts, estimated


@dataclass(frozen=True)
class ScaledUpdate:
    """One update on `ranks` GPUs.

    Seconds: compute, of the networks; host, of the CPU beyond them; gradients, to sum them; weights, of FSDP's messages
    that take longer than the networks. memory: the most bytes of each GPU.
    """

    ranks: int
    compute: float
    host: float
    gradients: float
    weights: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.host + self.gradients + self.weights


def scale_update(plan: StagePlan, gpu: Gpu, *, nodes: int, processes: int, sharding: str) -> ScaledUpdate:
    """An update on `nodes` times the machines of a plan. processes: of one machine. sharding: as in the config."""
    ranks = plan.ranks * nodes
    rate = gpu.link if ranks <= processes else gpu.network
    others = (ranks - 1) / ranks
    compute = estimate_update(plan, gpu).seconds
    weights = 0.0
    if sharding == "fsdp":
        weights = others * plan.gathered / rate
    elif sharding == "hsdp":
        weights = (processes - 1) / processes * plan.gathered / gpu.link
    return ScaledUpdate(
        ranks,
        compute,
        max(0.0, plan.noise * DRAW + plan.read / READ - compute),
        2 * others * plan.reduced / rate,
        max(0.0, weights - compute),
        plan.peak,
    )


def list_machines(nodes: int) -> list[int]:
    """1, 2, 4, ... machines, and `nodes` last."""
    return [*(2**power for power in range(nodes.bit_length()) if 2**power < nodes), nodes]
