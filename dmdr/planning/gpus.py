"""GPUs by name, with their memory and speed, and whether a plan fits on one. This file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from dmdr.planning.plan import StagePlan

SHARE = 0.45  # of its data sheet's FLOPs that a GPU reaches in training, with fused kernels and large enough batches
FIT = 0.93  # of free memory that tensors can use: fragmentation wastes the rest
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    memory: bytes that a process may use.
    flops, flops_float32: dense FLOPs a second of its data sheet, in bfloat16 and in float32.
    """

    name: str
    memory: float
    flops: float
    flops_float32: float

    @property
    def free(self) -> float:
        """Bytes for tensors: all memory but 1.5 GiB for CUDA and its libraries and 7 % that fragmentation wastes."""
        return FIT * (self.memory - 1.5 * GIB)

    def rate(self, precision: str) -> float:
        """FLOPs a second in this precision, by its data sheet."""
        return self.flops if precision == "bfloat16" else self.flops_float32

    def hours(self, plan: StagePlan, precision: str) -> float:
        """Hours of a whole stage on the plan's number of such GPUs, if each reaches SHARE of its FLOPs."""
        return plan.total / (plan.ranks * SHARE * self.rate(precision)) / 3600


GPUS = {  # from data sheets; float32 is TF32, which these GPUs' matrix units compute
    "a100-40": Gpu("NVIDIA A100 40 GB", 39.4 * GIB, 312e12, 156e12),
    "a100-80": Gpu("NVIDIA A100 80 GB", 79.1 * GIB, 312e12, 156e12),
    "l40s": Gpu("NVIDIA L40S 48 GB", 44.4 * GIB, 362e12, 183e12),
    "h100-80": Gpu("NVIDIA H100 80 GB", 79.1 * GIB, 989e12, 494e12),
    "h200": Gpu("NVIDIA H200 141 GB", 139.8 * GIB, 989e12, 494e12),
    "rtx-4090": Gpu("NVIDIA RTX 4090 24 GB", 23.5 * GIB, 165e12, 82.6e12),
}


def advise(config: Config, stages: list[StagePlan], gpu: Gpu) -> list[str]:
    """One line for each stage that says whether it fits; if one does not fit, also what to change, cheapest first."""
    lines, all_fit = [], True
    for plan in stages:
        need, moment = max((plan.peak, "an update"), (plan.load, "loading the teacher in float32"))
        fits = need <= gpu.free
        all_fit = all_fit and fits
        sizes = f"{need / GIB:.1f} of {gpu.free / GIB:.1f} GiB, {moment}"
        lines.append(f"{plan.stage}: {'fits' if fits else 'does not fit'} ({sizes})")
    if not all_fit:
        lines += [f"- {remedy}" for remedy in list_remedies(config, stages)]
    return lines


def list_remedies(config: Config, stages: list[StagePlan]) -> list[str]:
    """The changes that would save memory for this config, the cheapest first."""
    execution = config.execution
    share = max(-(-getattr(config, plan.stage).batch_size // plan.ranks) for plan in stages)
    kinds = {getattr(getattr(config, plan.stage), role).kind for plan in stages for role in plan.trained}
    trained = sum(stages[0].trained.values())
    remedies = []
    if config.precision == "float32":
        remedies.append("precision: bfloat16 halves the teacher and the activations")
    if (execution.micro_batch_size or share) > 1:
        remedies.append("execution.micro_batch_size: 1 holds the activations of one sample, for no more work")
    if kinds == {"adamw"}:
        remedies.append(f"kind: fused for both optimizers saves up to {4 * trained / GIB:.1f} GiB in their step")
    if execution.gradient_checkpointing != "all":
        remedies.append("execution.gradient_checkpointing: all keeps only each block's input, for a third more work")
    whole = [stage for stage, rl in config.list_rl().items() if rl.algorithm == "refl" and rl.decoder == "whole"]
    if any(rl.algorithm == "refl" for rl in config.list_rl().values()) and execution.decode_batch_size != 1:
        remedies.append("execution.decode_batch_size: 1 holds what ReFL's decoder keeps of one image, for no more work")
    if whole:
        remedies.append(
            f"{whole[-1]}.rl.decoder: tiled holds the activations of one tile; tiny (a TAESD) holds hardly any"
        )
    if "8bit" not in kinds:
        remedies.append(f"kind: 8bit for both optimizers saves {6 * trained / GIB:.1f} GiB; it needs bitsandbytes")
    if config.student.form == "full":
        remedies.append("student.form: lora trains a hundredth of the parameters and shares the teacher's weights")
    if execution.sharding == "none" and execution.processes > 1:
        remedies.append("execution.sharding: fsdp splits the weights over the GPUs, which then exchange more messages")
    remedies.append("teacher.resolution: half the side quarters the activations; or choose a GPU with more memory")
    return remedies
