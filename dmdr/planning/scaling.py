"""What more machines bring: time, memory and efficiency of an update, each GPU with the same share of a larger batch.

Everything here is estimated. Messages within a machine go over its links, others over the network, as in `gpus.py`.
1. Messages of weights (FSDP) overlap with the networks' work. All others wait for it, as the code does.
2. Each process draws the noise of the whole batch and reads all its prompts before the first network runs.
3. Checkpoints, and processes that wait for the slowest one, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.planning.gpus import Gpu
from dmdr.planning.roofline import estimate_update
from dmdr.planning.stage_plan import StagePlan

DRAW = 6.5e-9  # seconds of a CPU a normal number: 0.44 s for a rollout of 64 images of 1,024 pixels, measured
READ = 1.2e9  # bytes of conditioning a second that are read, joined and copied: 0.3 s for 64 prompts, estimated


@dataclass(frozen=True)
class ScaledUpdate:
    """One update on `ranks` GPUs.

    Seconds: compute, of the networks; host, before the first of them runs; states, to gather the rollout; gradients, to
    sum them; weights, of FSDP's messages that take longer than the networks. memory: the most bytes of each GPU.
    """

    ranks: int
    compute: float
    host: float
    states: float
    gradients: float
    weights: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.host + self.states + self.gradients + self.weights


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
        nodes * (plan.drawn * DRAW + 4 * plan.prompts * plan.conditioning / READ),
        others * nodes * plan.states / rate,
        2 * others * plan.reduced / rate,
        max(0.0, weights - compute),
        plan.peak + (nodes - 1) * plan.states,
    )


def list_machines(nodes: int) -> list[int]:
    """1, 2, 4, ... machines, and `nodes` last."""
    return [*(2**power for power in range(nodes.bit_length()) if 2**power < nodes), nodes]
