"""Each change that should make an update faster, alone, beside the update without it.

A lever is a small function: inside its context the stage is as the lever makes it. The line of one that this device or
this torch does not have says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from dmdr.config.execution import AttentionKernel
from dmdr.config.run import FrozenBase
from dmdr.kernels.attention import prepare_attention
from dmdr.kernels.compiled_blocks import list_repeated_blocks
from dmdr.kernels.frozen_base import check_frozen_base, find_layers, quantize
from dmdr.planning.measure.cases import Shape, Stage
from dmdr.planning.measure.clock import Target, release
from dmdr.planning.measure.correctness import halve
from dmdr.planning.measure.table import Line
from dmdr.rl.refl import ReFL
from dmdr.shared_base import DTYPES

Apply = Callable[[Stage], AbstractContextManager[None]]
SHAPE = Shape("SD3-Medium", 1024, 4, True)


def attend_by(kernel: AttentionKernel) -> Apply:
    """execution.attention."""

    @contextmanager
    def attend(stage: Stage) -> Iterator[None]:
        prepare_attention(kernel, stage.device, DTYPES[stage.config.precision])
        stage.base.backbone.attention = kernel
        try:
            yield
        finally:
            stage.base.backbone.attention = "auto"

    return attend


@contextmanager
def multiply_in_tf32(stage: Stage) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def keep_activations(stage: Stage) -> Iterator[None]:
    """execution.gradient_checkpointing: none."""
    networks = (stage.base.backbone.network, stage.base.backbone.vae)
    for network in networks:
        network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        stage.base.recompute_activations("all" if stage.shape.recompute else "none")


@contextmanager
def keep_attention(stage: Stage) -> Iterator[None]:
    """execution.gradient_checkpointing: attention."""
    stage.base.recompute_activations("attention")
    try:
        yield
    finally:
        stage.base.recompute_activations("all" if stage.shape.recompute else "none")


@contextmanager
def compile_blocks(stage: Stage) -> Iterator[None]:
    """execution.compile; without a code generator on a CPU, where it takes a minute."""
    blocks = list_repeated_blocks(stage.base.backbone.network)
    plain = [block.forward for block in blocks]
    stage.base.compile_blocks(backend="inductor" if stage.device == "cuda" else "eager")
    try:
        yield
    finally:
        for block, forward in zip(blocks, plain, strict=True):
            block.forward = forward
        torch._dynamo.reset()


def freeze_in(kind: FrozenBase) -> Apply:
    """frozen_base. The plain layers come back afterwards."""

    @contextmanager
    def freeze(stage: Stage) -> Iterator[None]:
        check_frozen_base(kind, stage.device)
        network = stage.base.backbone.network
        plain = list(find_layers(network))
        quantize(network, kind)
        try:
            yield
        finally:
            for parent, name, layer in plain:
                setattr(parent, name, layer)

    return freeze


@contextmanager
def decode_in_bfloat16(stage: Stage) -> Iterator[None]:
    assert stage.run.rl is not None and isinstance(stage.run.rl.algorithm, ReFL)
    algorithm = stage.run.rl.algorithm
    before, algorithm.decode = algorithm.decode, halve(algorithm.decode, stage.device)
    try:
        yield
    finally:
        algorithm.decode = before


@contextmanager
def decode_channels_last(stage: Stage) -> Iterator[None]:
    vae = stage.base.backbone.vae
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' wrapper hides that it is a method
    try:
        yield
    finally:
        vae.to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]  # as above


@dataclass(frozen=True)
class Lever:
    """name: of its line. apply: its context. part: what it makes faster."""

    name: str
    apply: Apply
    part: str = "fake score"


LEVERS = (
    Lever("attention by cuDNN", attend_by("cudnn")),
    Lever("attention by FlashAttention 3", attend_by("fa3")),
    Lever("products in TF32", multiply_in_tf32),
    Lever("activations kept", keep_activations),
    Lever("attention's results kept", keep_attention),
    Lever("blocks compiled", compile_blocks),
    Lever("frozen base in fp8", freeze_in("fp8")),
    Lever("frozen base in nf4", freeze_in("nf4")),
    Lever("decoder in bfloat16", decode_in_bfloat16, "reward"),
    Lever("decoder with channels last", decode_channels_last, "reward"),
)


def run_part(stage: Stage, part: str) -> None:
    if part == "reward":
        stage.update_student(rewarded=True)
        return
    stage.roll_out()
    stage.update_fake_score()


def find_gradient(stage: Stage, part: str) -> torch.Tensor:
    """The gradient that a part leaves, flat."""
    if part == "fake score":
        return stage.find_gradient()
    parameters = stage.base.student_parameters.values()
    return torch.cat([each.grad.detach().flatten().double().cpu() for each in parameters if each.grad is not None])


def measure_levers(target: Target) -> Iterator[Line]:
    """Seconds of a rollout and a part of the fake score, or of a part of the student with its reward, what a lever
    saves of them, and how far the gradient moves: 1 - cosine."""
    stage = Stage(SHAPE.shrink() if target.tiny else SHAPE, target.device)
    stage.roll_out()
    for trainable in (stage.state.student, stage.state.fake_score):
        trainable.set_learning_rate(0.0)  # so that all levers see the same weights
    plain, gradients = {}, {}
    for part in dict.fromkeys(lever.part for lever in LEVERS):
        plain[part] = target.time_work(partial(run_part, stage, part)).seconds
        gradients[part] = find_gradient(stage, part)
        yield Line(f"no lever, {part}", {"s": plain[part]})
    for lever in LEVERS:
        yield measure_lever(target, lever, stage, plain[lever.part], gradients[lever.part])
        release()


def measure_lever(target: Target, lever: Lever, stage: Stage, plain: float, gradient: torch.Tensor) -> Line:
    with ExitStack() as stack:
        try:
            stack.enter_context(lever.apply(stage))
            timing = target.time_work(lambda: run_part(stage, lever.part))
        except Exception as error:  # whatever a compiler or a kernel raises ends this line, not the run
            return Line(lever.name, note=f"not here: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        moved = 1 - float(F.cosine_similarity(gradient, find_gradient(stage, lever.part), dim=0))
    figures = {"s": timing.seconds, "saved": 1 - timing.seconds / plain, "1 - cosine": moved}
    return Line(lever.name, {**figures, "peak GiB": timing.peak / 2**30})
