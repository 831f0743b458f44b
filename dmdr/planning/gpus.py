"""GPUs by name: what they hold, what they do, and whether a plan fits one. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from dmdr.planning.plan import StagePlan

SHARE = 0.45  # of a GPU's FLOPs that a training run reaches, where its kernels are fused and its batches fill it
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory: bytes that a process may use; flops: dense bfloat16 FLOPs a second, float32 ones a fraction."""

    name: str
    memory: float
    flops: float
    flops_float32: float

    @property
    def free(self) -> float:
        """What tensors may take: less 1.5 GiB for CUDA and its libraries, and 7 % that fragments are lost to."""
        return 0.93 * (self.memory - 1.5 * GIB)

    def rate(self, precision: str) -> float:
        """FLOPs a second of its data sheet."""
        return self.flops if precision == "bfloat16" else self.flops_float32

    def hours(self, found: StagePlan, precision: str) -> float:
        """Of a whole stage on GPUs like this, where they reach SHARE of their FLOPs."""
        return found.updates * found.flops / (found.ranks * SHARE * self.rate(precision)) / 3600


GPUS = {  # data sheets; float32 is TF32 where a matrix unit has it
    "a100-40": Gpu("NVIDIA A100 40 GB", 39.4 * GIB, 312e12, 156e12),
    "a100-80": Gpu("NVIDIA A100 80 GB", 79.1 * GIB, 312e12, 156e12),
    "l40s": Gpu("NVIDIA L40S 48 GB", 44.4 * GIB, 362e12, 183e12),
    "h100-80": Gpu("NVIDIA H100 80 GB", 79.1 * GIB, 989e12, 494e12),
    "h200": Gpu("NVIDIA H200 141 GB", 139.8 * GIB, 989e12, 494e12),
    "rtx-4090": Gpu("NVIDIA RTX 4090 24 GB", 23.5 * GIB, 165e12, 82.6e12),
}


def advise(config: Config, stages: list[StagePlan], gpu: Gpu) -> list[str]:
    """Whether it fits, a line a stage, and if not, what to change, in the order in which it costs least."""
    lines, short = [], False
    for found in stages:
        need, what = max((found.peak, "an update"), (found.load, "loading the teacher in float32"))
        fits = need <= gpu.free
        short = short or not fits
        said = f"{need / GIB:.1f} of {gpu.free / GIB:.1f} GiB, {what}"
        lines.append(f"{found.stage}: {'fits' if fits else 'does not fit'} ({said})")
    if short:
        lines += [f"- {each}" for each in list_remedies(config, stages)]
    return lines


def list_remedies(config: Config, stages: list[StagePlan]) -> list[str]:
    """What saves memory here, the cheapest first."""
    execution, rl, precision = config.execution, config.joint.rl, config.precision
    share = max(-(-getattr(config, found.stage).batch_size // found.ranks) for found in stages)
    kinds = {getattr(getattr(config, found.stage), role).kind for found in stages for role in found.trained}
    trained = sum(stages[0].trained.values())
    found = []
    if precision == "float32":
        found.append("precision: bfloat16 halves the teacher and the activations")
    if (execution.micro_batch_size or share) > 1:
        found.append("execution.micro_batch_size: 1 holds the activations of one sample; no more work")
    if kinds == {"adamw"}:
        found.append(f"kind: fused for both optimizers saves up to {4 * trained / GIB:.1f} GiB in their step")
    if not execution.gradient_checkpointing:
        found.append("execution.gradient_checkpointing: true keeps what enters each block, for a third more work")
    if rl is not None and rl.algorithm == "refl" and rl.decoder == "whole":
        found.append("joint.rl.decoder: tiled holds one tile's activations, tiny (a TAESD) hardly any")
    if "8bit" not in kinds:
        found.append(f"kind: 8bit for both optimizers saves {6 * trained / GIB:.1f} GiB; it needs bitsandbytes")
    if config.student.form == "full":
        found.append("student.form: lora trains a hundredth of the parameters beside the one shared teacher")
    if execution.sharding == "none" and execution.processes > 1:
        found.append("execution.sharding: fsdp splits the weights over the GPUs, for messages between them")
    found.append("teacher.resolution: half the side is a quarter of the activations; or a GPU with more memory")
    return found
