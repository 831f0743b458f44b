"""ReFL through the real decoder and reward: its gradient equals finite differences; each prompt comes once an epoch."""

from __future__ import annotations

import pytest
import torch

from dmdr import teacher
from dmdr.config import ReFL as ReFLConfig
from dmdr.errors import ConfigError
from dmdr.rl.refl import ReFL
from dmdr.train import prompt_order

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def refl():
    backbone = teacher.load(teacher.resolve("lab:flow"), text=False)
    backbone.pipe.vae.double()
    algorithm = ReFL(ReFLConfig(weight=1.0, rewards={"lab-conv": 1.0, "lab-mixer": 0.5}), backbone)
    for reward in algorithm.rewards.values():
        reward.double()
    return algorithm


def test_gradient_equals_finite_differences(refl):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, *refl.backbone.latent_shape, generator=generator, dtype=torch.float64) * 0.3
    x0.requires_grad_(True)
    loss, _ = refl(x0, PROMPTS)
    loss.backward()
    direction = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        slope = (refl(x0 + h * direction, PROMPTS)[0] - refl(x0 - h * direction, PROMPTS)[0]) / (2 * h)
    assert float((x0.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-4, abs=1e-9)


def test_loss_is_minus_the_weighted_mean_reward(refl):
    x0 = torch.zeros(2, *refl.backbone.latent_shape, dtype=torch.float64)
    loss, figures = refl(x0, PROMPTS)
    images = refl.backbone.decode(x0)
    expected = {name: reward(images, PROMPTS).mean() for name, reward in refl.rewards.items()}
    assert float(loss) == pytest.approx(-float(expected["lab-conv"] + 0.5 * expected["lab-mixer"]))
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(
        {f"reward/{name}": float(value) for name, value in expected.items()}
    )


def test_a_reward_without_gradient_is_refused(refl, monkeypatch):
    monkeypatch.setattr(type(refl.rewards["lab-mixer"]), "differentiable", False)
    with pytest.raises(ConfigError, match="lab-mixer has none|has none"):
        ReFL(ReFLConfig(weight=1.0, rewards={"lab-mixer": 1.0}), refl.backbone)


def test_prompts_come_once_an_epoch_whatever_the_window():
    whole = prompt_order(5, "joint", 0, 70, 23)
    assert sorted(whole[:23]) == sorted(whole[23:46]) == list(range(23)) and whole[:23] != whole[23:46]
    pieces = [index for start in range(0, 70, 7) for index in prompt_order(5, "joint", start, 7, 23)]
    assert pieces == whole
    assert prompt_order(5, "cold_start", 0, 23, 23) != whole[:23]
