"""Whether the device computes what a CPU computes. A line that fails makes every time below it worthless."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmdr.planning.measure.cases import Shape, Stage
from dmdr.planning.measure.table import Line
from dmdr.rewards.protocol import Reward
from dmdr.rl.decoders import measure_gradient_cosine
from dmdr.train import training_step

LEAST_COSINE = {"float32": 0.999, "bfloat16": 0.98}  # ours: between gradients of the fake score
LEAST_DECODED = 0.99  # between gradients of a reward through a decoder in bfloat16 and in float32
BACKENDS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def check_device(device: str) -> Iterator[Line]:
    """Every check, on networks that are small everywhere."""
    for network in ("SD3-Medium", "SDXL"):
        for precision in ("float32", "bfloat16"):
            yield compare_with_cpu(Shape(network, 512, 2, False, precision).shrink(), device)
    shape = Shape("SD3-Medium", 512, 2, True).shrink()
    yield compare_updates(shape, device)
    yield compare_resumed(shape, device)
    yield compare_decoders(shape, device)
    for name, backend in BACKENDS.items():
        yield compare_attention(name, backend, device)


def compare_with_cpu(shape: Shape, device: str) -> Line:
    """Loss and gradient of a fake-score update, beside those of a CPU in float32."""
    losses, gradients = [], []
    for where, precision in (("cpu", "float32"), (device, shape.precision)):
        stage = Stage(Shape(shape.network, shape.resolution, shape.micro, False, precision, tiny=True), where)
        stage.roll_out()
        losses.append(float(stage.update_fake_score()["loss_fake"]))
        gradients.append(stage.find_gradient())
    cosine = float(F.cosine_similarity(gradients[0], gradients[1], dim=0))
    apart = abs(losses[1] / losses[0] - 1)
    return Line(
        f"{shape.network} in {shape.precision} beside a CPU",
        {"loss differs by": apart, "cosine of gradients": cosine},
        failed=not cosine >= LEAST_COSINE[shape.precision],
    )


def list_numbers(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in stage.state.tensors().items()}


def count_different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    return sum(not torch.equal(value, other[name]) for name, value in one.items()) + len(one.keys() ^ other.keys())


def compare_updates(shape: Shape, device: str) -> Line:
    """The same update twice: the same bits."""
    found = []
    for _ in range(2):
        stage = Stage(shape, device)
        stage.state.advance(training_step(stage.run, stage.state))
        found.append(list_numbers(stage))
    different = count_different(*found)
    return Line("the same update twice", {"tensors that differ": different}, failed=different > 0)


def compare_resumed(shape: Shape, device: str) -> Line:
    """Two updates, and one more after one whose state was saved: the same bits."""
    whole, second = Stage(shape, device), Stage(shape, device)
    whole.state.advance(training_step(whole.run, whole.state))
    saved, info = list_numbers(whole), whole.state.info()
    rows = list(info["rows"])
    whole.state.advance(training_step(whole.run, whole.state))
    second.state.restore(saved, {**info, "rows": rows})
    second.state.advance(training_step(second.run, second.state))
    different = count_different(list_numbers(whole), list_numbers(second))
    return Line("an update after a resume", {"tensors that differ": different}, failed=different > 0)


def compare_decoders(shape: Shape, device: str) -> Line:
    """The gradient of a reward through the decoder in bfloat16, beside the one in float32."""
    stage = Stage(shape, device)
    assert stage.run.rl is not None
    reward: Reward = stage.run.rl.algorithm.reward.rewards["first"]
    backbone, generator = stage.base.backbone, torch.Generator().manual_seed(3)
    latents = torch.randn(2, *backbone.latent_shape, generator=generator).to(device)
    half = halve(backbone.decode, device)
    cosines = measure_gradient_cosine(reward, latents, ["a", "b"], backbone.decode, half)
    least = float(cosines.min())
    return Line("reward through a bfloat16 decoder", {"cosine of gradients": least}, failed=not least > LEAST_DECODED)


def halve(decode: Callable[[torch.Tensor], torch.Tensor], device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A decoder under bfloat16 autocast."""

    def decode_in_half(latents: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return decode(latents).float()

    return decode_in_half


def compare_attention(name: str, backend: SDPBackend, device: str) -> Line:
    """The backward pass of a fused kernel beside that of the plain formula in float32."""
    generator = torch.Generator().manual_seed(4)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain = [torch.randn(1, 2, 128, 64, generator=generator).to(device).requires_grad_(True) for _ in range(3)]
    fused = [each.detach().to(dtype).requires_grad_(True) for each in plain]
    with sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(plain[0], plain[1], plain[2]).square().sum().backward()
    line = f"attention by {name}"
    try:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(fused[0], fused[1], fused[2]).float().square().sum().backward()
    except RuntimeError as error:
        return Line(line, note=f"not here: {str(error).splitlines()[0]}")
    pairs = zip(plain, fused, strict=True)
    gradients = [(a.grad, b.grad) for a, b in pairs]
    cosines = [
        F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0)
        for a, b in gradients
        if a is not None and b is not None
    ]
    least = min(map(float, cosines))
    return Line(line, {"cosine of gradients": least}, failed=not least > LEAST_COSINE["bfloat16"])
