"""The oracle: the same update as the official demo and DMD2 structure it. One state at a time, nothing shared.

Each state is reached by its own sampling loop from its own noise; the fake score is run once for the score and again
for its loss; real-cond and real-uncond are two calls; a batch is a loop over its samples. Slow on purpose.
"""

from __future__ import annotations

import torch

from dmdr.backbones import Conditioning
from dmdr.backbones.scores import FAKE, SharedBase
from dmdr.update import Renoise


def one(c: Conditioning, index: int) -> Conditioning:
    return {key: value[index : index + 1] for key, value in c.items()}


def simulate(base: SharedBase, c: Conditioning, times: torch.Tensor, noises: torch.Tensor, pair: int):
    """(x_t, t, conditioning) that a sampler sees at step `pair // M` of trajectory `pair % M`."""
    step, trajectory = divmod(pair, noises.shape[1])
    mine = one(c, trajectory)
    x = noises[0, trajectory : trajectory + 1]
    with torch.no_grad():
        for index in range(step):
            x0 = base.student(x, times[index].reshape(1), mine)
            after = times[index + 1]
            x = (1 - after) * x0 + after * noises[index + 1, trajectory : trajectory + 1]
    return x, times[step].reshape(1), mine


def fake_x0(base: SharedBase, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning, scale: float) -> torch.Tensor:
    with base.wearing(FAKE, scale) as network:
        return x_t - t.view(-1, 1, 1, 1) * base.backbone.predict(network, x_t, t, c)


def fake_loss(base: SharedBase, states: list, renoise: Renoise) -> torch.Tensor:
    """mean |v - (noise - x0)|^2 of the fake score on fresh student samples."""
    total = 0.0
    for index, (x, t, c) in enumerate(states):
        with torch.no_grad():
            x0 = base.student(x, t, c)
        level, noise = renoise.t[index : index + 1], renoise.noise[index : index + 1]
        x_t = (1 - level.item()) * x0 + level.item() * noise
        velocity = (x_t - fake_x0(base, x_t, level, c, base.fake_scale)) / level.view(-1, 1, 1, 1)
        total = total + (velocity - (noise - x0)).pow(2).mean() / len(states)
    return total


def student_loss(
    base: SharedBase,
    states: list,
    renoise: Renoise,
    unconditional: Conditioning,
    *,
    guidance_scale: float,
    scale: float,
) -> torch.Tensor:
    """A loss whose gradient is mean over samples and pixels of grad * dx0, grad as in the official demo."""
    total = 0.0
    for index, (x, t, c) in enumerate(states):
        x0 = base.student(x, t, c)
        with torch.no_grad():
            level, noise = renoise.t[index : index + 1], renoise.noise[index : index + 1]
            x_t = (1 - level.item()) * x0 + level.item() * noise
            real_c = fake_x0(base, x_t, level, c, scale)
            real_u = fake_x0(base, x_t, level, unconditional, scale)
            real = real_u + guidance_scale * (real_c - real_u)
            p_real, p_fake = x0 - real, x0 - fake_x0(base, x_t, level, c, base.fake_scale)
            grad = (p_real - p_fake) / p_real.abs().mean()
        total = total + (grad * x0).mean() / len(states)
    return total
