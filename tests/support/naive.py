"""The oracle: the same update as the official demo and DMD2 structure it. One state at a time, nothing shared.

Each state is reached by its own sampling loop from its own noise; the fake score is run once for the score and again
for its loss; real-cond and real-uncond are two calls; a batch is a loop over its samples. Slow on purpose.
Both families, from the papers' own formulas: rectified flow, and DDPM with alpha_bar by its definition.
"""

from __future__ import annotations

import torch

from dmdr.backbones.protocol import Conditioning
from dmdr.shared_base import FAKE, SharedBase
from dmdr.update import Levels


def mixed(base: SharedBase, x0: torch.Tensor, noise: torch.Tensor, t: float) -> torch.Tensor:
    """x_t."""
    if base.backbone.family == "sd3":
        return (1 - t) * x0 + t * noise
    a = alpha_bar(t)
    return a**0.5 * x0 + (1 - a) ** 0.5 * noise


def clean(base: SharedBase, x_t: torch.Tensor, prediction: torch.Tensor, t: float) -> torch.Tensor:
    """x0 from velocity or noise."""
    if base.backbone.family == "sd3":
        return x_t - t * prediction
    a = alpha_bar(t)
    return (x_t - (1 - a) ** 0.5 * prediction) / a**0.5


def alpha_bar(t: float) -> float:
    """Of Stable Diffusion's schedule at the timestep nearest to t in (0, 1]."""
    product = 1.0
    for k in range(round(t * 1000)):
        product *= 1 - (0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
    return product


def one(c: Conditioning, index: int) -> Conditioning:
    return {key: value[index : index + 1] for key, value in c.items()}


def follow_ode(base: SharedBase, x: torch.Tensor, x0: torch.Tensor, t: float, after: float) -> torch.Tensor:
    """Euler's step in the time of a flow, or in the sigma of x / sqrt(alpha_bar) = x0 + sigma noise."""
    if base.backbone.family == "sd3":
        return x + (after - t) * (x - x0) / t
    a, b = alpha_bar(t), alpha_bar(after)
    sigma, sigma_after = ((1 - a) / a) ** 0.5, ((1 - b) / b) ** 0.5
    scaled = x / a**0.5
    return (scaled + (sigma_after - sigma) * (scaled - x0) / sigma) * b**0.5


def simulate(base: SharedBase, c: Conditioning, times: torch.Tensor, noises: torch.Tensor, pair: int, eta: float):
    """(x_t, t, conditioning) that a sampler sees at step `pair // M` of trajectory `pair % M`; eta 0 or 1."""
    step, trajectory = divmod(pair, noises.shape[1])
    mine = one(c, trajectory)
    x = noises[0, trajectory : trajectory + 1]
    with torch.no_grad():
        for index in range(step):
            x0 = base.student(x, times[index].reshape(1), mine)
            after = times[index + 1].item()
            if eta == 1:
                x = mixed(base, x0, noises[index + 1, trajectory : trajectory + 1], after)
            else:
                x = follow_ode(base, x, x0, times[index].item(), after)
    return x, times[step].reshape(1), mine


def fake_x0(base: SharedBase, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning, scale: float) -> torch.Tensor:
    with base.use_adapter(FAKE, scale) as network:
        return clean(base, x_t, base.backbone.predict(network, x_t, t, c), t.item())


def fake_loss(base: SharedBase, states: list, renoise: Levels) -> torch.Tensor:
    """mean |prediction - target|^2 of the fake score on fresh student samples."""
    total = 0.0
    for index, (x, t, c) in enumerate(states):
        with torch.no_grad():
            x0 = base.student(x, t, c)
        level, noise = renoise.t[index : index + 1], renoise.noise[index : index + 1]
        x_t = mixed(base, x0, noise, level.item())
        with base.use_adapter(FAKE, base.fake_scale) as network:
            prediction = base.backbone.predict(network, x_t, level, c)
        target = noise - x0 if base.backbone.family == "sd3" else noise
        total = total + (prediction - target).pow(2).mean() / len(states)
    return total


def student_loss(
    base: SharedBase,
    states: list,
    renoise: Levels,
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
            x_t = mixed(base, x0, noise, level.item())
            real_c = fake_x0(base, x_t, level, c, scale)
            real_u = fake_x0(base, x_t, level, unconditional, scale)
            real = real_u + guidance_scale * (real_c - real_u)
            p_real, p_fake = x0 - real, x0 - fake_x0(base, x_t, level, c, base.fake_scale)
            grad = (p_real - p_fake) / p_real.abs().mean()
        total = total + (grad * x0).mean() / len(states)
    return total
