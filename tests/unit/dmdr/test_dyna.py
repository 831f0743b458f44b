"""DynaDG, DynaRS and the path: limits, monotony, distributions, and the round trips of the algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from dmdr.config.training import Dynamic
from dmdr.dyna import real_scale, renoise_beta, renoise_levels
from dmdr.losses import distribution_matching, fake_score
from dmdr.noise import noise_for, uniforms_for
from dmdr.path import FlowPath, VPPath

DYNAMIC = Dynamic(updates=40, real_scale=0.75, renoise=(4.0, 1.5))


def test_dynadg_falls_by_a_cosine_to_exactly_zero():
    scales = [real_scale(update, DYNAMIC) for update in range(60)]
    assert scales[0] == 0.75
    assert scales[20] == pytest.approx(0.375)
    assert all(a > b for a, b in zip(scales[:40], scales[1:41], strict=True))
    assert scales[40:] == [0.0] * 20
    assert scales[10] == pytest.approx(0.75 * (1 + math.cos(math.pi / 4)) / 2)


def test_the_ablation_rows_are_configs():
    vanilla = Dynamic(updates=0)
    static = Dynamic(updates=40, schedule="constant")
    no_dg, no_rs = Dynamic(updates=40, real_scale=0.0), Dynamic(updates=40, renoise=(1.0, 1.0))
    for update in (0, 17, 39, 40, 1000):
        assert real_scale(update, vanilla) == 0 and renoise_beta(update, vanilla) == (1, 1)
        assert real_scale(update, static) == 0.75 and renoise_beta(update, static) == (4.0, 1.5)
        assert real_scale(update, no_dg) == 0 and renoise_beta(update, no_rs) == (1, 1)


@pytest.mark.parametrize("update", [0, 20, 40])
def test_levels_follow_their_beta(update):
    beta = renoise_beta(update, DYNAMIC)
    uniform = uniforms_for(5, "levels", update, rows=range(4000))
    levels = renoise_levels(beta, (0.0, 1.0), uniform).numpy()
    assert stats.kstest(levels, stats.beta(*beta).cdf).pvalue > 0.01
    squeezed = renoise_levels(beta, (0.02, 0.98), uniform).numpy()
    assert np.allclose(squeezed, 0.02 + 0.96 * levels, atol=1e-6)


def scaled_linear() -> torch.Tensor:
    """alpha_bar of Stable Diffusion's schedule, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


@pytest.mark.parametrize(
    "path", [FlowPath(), VPPath(scaled_linear()), VPPath(scaled_linear(), "v_prediction")], ids=["flow", "vp", "v"]
)
def test_path_round_trips(path):
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, prediction = path.renoise(x0, noise, t), path.target(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.allclose(path.to_x0(x_t, prediction, t), x0)
    halfway = path.step(x_t, prediction, t, t / 2)
    assert torch.allclose(halfway, path.renoise(x0, noise, t / 2))
    signal, spread = path.signal_and_spread(t)
    assert (signal.diff() < 0).all() and (spread.diff() > 0).all() and spread[-1] > 0.99


def test_vp_path_is_that_of_ddpm():
    """The oracle is diffusers' DDPMScheduler, timestep by timestep."""
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    path, generator = VPPath(ddpm.alphas_cumprod), torch.Generator().manual_seed(4)
    x0, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    k = torch.tensor([0, 249, 500, 999])
    t = (k + 1) / 1000
    assert torch.equal(path.timestep(t), k) and torch.equal(path.timestep(t + 4e-4), k)
    assert torch.allclose(path.renoise(x0, noise, t), ddpm.add_noise(x0, noise, k), atol=1e-6)


def test_noise_is_a_function_of_its_key_alone():
    first = noise_for(1, "rollout", 7, shape=(2, 3))
    torch.randn(100)
    assert torch.equal(first, noise_for(1, "rollout", 7, shape=(2, 3)))
    others = [
        noise_for(2, "rollout", 7, shape=(2, 3)),
        noise_for(1, "rollout", 8, shape=(2, 3)),
        noise_for(1, "renoise", 7, shape=(2, 3)),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_distribution_matching_pulls_towards_the_real_score():
    generator = torch.Generator().manual_seed(3)
    x0, real, fake = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_(True)
    distribution_matching(x0, real, fake).backward()
    weight = (x0.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(x0.grad, (fake - real) / weight / x0.numel())
    x0.grad = None
    distribution_matching(x0, fake, fake).backward()
    assert torch.equal(x0.grad, torch.zeros_like(x0)), "equal scores must leave the student alone"


def test_fake_score_loss_is_least_at_the_conditional_mean():
    """E|v - target|^2 over noise is minimised by the mean target: the loss that makes the fake score a score."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(64, 1, 4, 4, generator=generator, dtype=torch.float64)
    mean = target.mean(0, keepdim=True).expand_as(target)
    best = fake_score(mean, target)
    for shift in (-0.1, 0.1):
        assert fake_score(mean + shift, target) > best
