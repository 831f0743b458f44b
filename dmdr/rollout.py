"""Sample: backward simulation, the few-step student, the multi-step teacher with CFG; and the noise that all use.

1. Noise is a pure function of a seed and a key, never of history: a resumed or a resharded run draws the same noise.
2. Backward simulation follows inference: the input of each trained step is what the sampler itself would see there.
   (The official demo trains on an x0 that it renoises to the time of its prediction, one prediction ahead.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr.backbones.protocol import Backbone, Conditioning


def generator_for(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def noise_for(seed: int, *key: int | str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 of `shape`, a pure function of (seed, key)."""
    return torch.randn(shape, generator=generator_for(seed, *key))


@dataclass(frozen=True)
class States:
    """Inputs and predictions of N sampling steps of B trajectories: times (N,), x_t and x0 (N, B, C, H, W)."""

    times: torch.Tensor
    x_t: torch.Tensor
    x0: torch.Tensor


@torch.no_grad()
def simulate_backward(
    student: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    backbone: Backbone,
    *,
    times: torch.Tensor,
    noises: torch.Tensor,
) -> States:
    """Run the few-step sampler: predict x0, renoise it to the next time with fresh noise.

    Args:
        student: (x_t (B, C, H, W), t (B,)) -> x0.
        times: (N + 1,), student_timesteps and a final 0.
        noises: (N, B, C, H, W); trajectories start at noises[0], and step i adds noises[i].
    """
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    x_t = noises[0]
    for index, t in enumerate(times[:-1]):
        if index > 0:
            x_t = backbone.path.renoise(outputs[-1], noises[index], t.expand(len(x_t)))
        inputs.append(x_t)
        outputs.append(student(x_t, t.expand(len(x_t))))
    return States(times[:-1], torch.stack(inputs), torch.stack(outputs))


def sample_student(
    backbone: Backbone, network: torch.nn.Module, c: Conditioning, times: torch.Tensor, noises: torch.Tensor
) -> torch.Tensor:
    """The student's x0 (B, C, H, W) after its N steps, without CFG; `times` and `noises` as in `simulate_backward`."""

    def student(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return backbone.predict_x0(network, x_t, t, c)

    return simulate_backward(student, backbone, times=times, noises=noises).x0[-1]


def predict_guided(
    backbone: Backbone,
    network: torch.nn.Module,
    x_t: torch.Tensor,
    t: torch.Tensor,
    c: Conditioning,
    unconditional: Conditioning,
    scale: float,
) -> torch.Tensor:
    """Classifier-free guidance: u + scale (c - u) of raw predictions, both halves in one call; scale 1 runs only c.

    A network into which guidance was distilled takes the scale as an input instead.
    `unconditional` holds one row, the empty prompt, which every sample of the batch uses.
    """
    if scale == 1.0:
        return backbone.predict(network, x_t, t, c)
    if backbone.guidance_is_input:
        return backbone.predict(network, x_t, t, {**c, "guidance": torch.full_like(c["guidance"], scale)})
    both = {key: torch.cat([value, unconditional[key].expand_as(value)]) for key, value in c.items()}
    prediction = backbone.predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    with_prompt, without_prompt = prediction.chunk(2)
    return without_prompt + scale * (with_prompt - without_prompt)


@torch.no_grad()
def sample_teacher(
    backbone: Backbone,
    c: Conditioning,
    unconditional: Conditioning,
    *,
    guidance_scale: float,
    times: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The teacher's x0 (B, C, H, W): Euler steps along `times` (steps + 1,) from `noise`, as its own pipeline does."""
    x_t = noise
    for time, next_time in zip(times[:-1], times[1:], strict=True):
        t, t_next = time.expand(len(x_t)), next_time.expand(len(x_t))
        prediction = predict_guided(backbone, backbone.network, x_t, t, c, unconditional, guidance_scale)
        x_t = backbone.path.step(x_t, prediction, t, t_next)
    return x_t
