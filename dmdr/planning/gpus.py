"""GPUs by name, with their memory and speed, and whether a plan fits on one. This file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from dmdr.planning.stage_plan import StagePlan

FIT = 0.93  # of free memory that tensors can use: fragmentation wastes the rest
GIB = 2**30


@dataclass(frozen=True)
class Reached:
    """The shares of its data sheet that a kind of GPU reaches, by the kind of an operator. Float32 attention is a share
    of plain float32, because no fused kernel of it uses matrix units."""

    product: float
    attention: float
    attention_backward: float
    float32_attention: float
    convolution: float
    memory: float


# H100: 620 TFLOP/s of products, 320 and 270 of attention (FlashAttention 2, heads of 64), 170 of TF32 convolutions, 27
# of float32 attention, 2.6 TB/s, as published. The others are estimates of ours.
HOPPER = Reached(0.63, 0.32, 0.27, 0.40, 0.34, 0.78)
BLACKWELL = Reached(0.65, 0.18, 0.15, 0.40, 0.30, 0.78)  # FlashAttention 2 does not use its newest matrix units
AMPERE = Reached(0.78, 0.60, 0.50, 0.50, 0.45, 0.85)
CONSUMER = Reached(0.85, 0.65, 0.55, 0.50, 0.50, 0.88)  # its matrix units are slower, so kernels keep up with them


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    memory: bytes that a process may use. flops, tf32, float32: dense FLOPs a second in bfloat16, in TF32, and in plain
    float32. bandwidth: bytes a second of its memory. link, network: bytes a second that it sends to GPUs of its own
    machine and of others; 400 Gbit/s a GPU where GPUs have links of their own, else 100.
    """

    name: str
    memory: float
    flops: float
    tf32: float
    float32: float
    bandwidth: float
    link: float
    network: float
    reached: Reached

    @property
    def free(self) -> float:
        """Bytes for tensors: all memory but 1.5 GiB for CUDA and its libraries and 7 % that fragmentation wastes."""
        return FIT * (self.memory - 1.5 * GIB)

    def rate(self, precision: str) -> float:
        """FLOPs a second in this precision, by its data sheet. Float32 is torch's own, without TF32."""
        return self.float32 if precision == "float32" else self.flops


GPUS = {
    "rtx-3090": Gpu("NVIDIA RTX 3090 24 GB", 23.5 * GIB, 71e12, 35.6e12, 35.6e12, 936e9, 25e9, 12.5e9, CONSUMER),
    "rtx-4090": Gpu("NVIDIA RTX 4090 24 GB", 23.5 * GIB, 165e12, 82.6e12, 82.6e12, 1008e9, 25e9, 12.5e9, CONSUMER),
    "rtx-5090": Gpu("NVIDIA RTX 5090 32 GB", 31.3 * GIB, 209e12, 105e12, 105e12, 1792e9, 50e9, 12.5e9, CONSUMER),
    "a10g": Gpu("NVIDIA A10G 24 GB", 22.0 * GIB, 70e12, 35e12, 31.5e12, 600e9, 25e9, 12.5e9, AMPERE),
    "l4": Gpu("NVIDIA L4 24 GB", 22.0 * GIB, 121e12, 60e12, 30.3e12, 300e9, 25e9, 12.5e9, AMPERE),
    "l40s": Gpu("NVIDIA L40S 48 GB", 44.4 * GIB, 362e12, 183e12, 91.6e12, 864e9, 25e9, 12.5e9, AMPERE),
    "a100-40": Gpu("NVIDIA A100 40 GB", 39.4 * GIB, 312e12, 156e12, 19.5e12, 1555e9, 300e9, 50e9, AMPERE),
    "a100-80": Gpu("NVIDIA A100 80 GB", 79.1 * GIB, 312e12, 156e12, 19.5e12, 2039e9, 300e9, 50e9, AMPERE),
    "h100-80": Gpu("NVIDIA H100 80 GB", 79.1 * GIB, 989e12, 494e12, 67e12, 3350e9, 450e9, 50e9, HOPPER),
    "h200": Gpu("NVIDIA H200 141 GB", 139.8 * GIB, 989e12, 494e12, 67e12, 4800e9, 450e9, 50e9, HOPPER),
    "b200": Gpu("NVIDIA B200 180 GB", 178.3 * GIB, 2250e12, 1125e12, 75e12, 7700e9, 900e9, 50e9, BLACKWELL),
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
