"""The gradient that evolution strategies estimate, beside gradients that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dmdr.config.rl import EvolutionStrategies as EvolutionStrategiesConfig
from dmdr.noise import noise_for
from dmdr.rl.evolution_strategies import EvolutionStrategies
from dmdr.rollout import States, Window

SHAPE, STEPS, COUNT = (2, 7, 5), 4, 16
SIZE = math.prod(SHAPE)
CELLS = ([3, 3, 1], [3, 2])  # of a side of 7 and one of 5, where a grid of 3 makes cells of 3 places


class World:
    """What evolution strategies ask of a shared base: latents are images."""

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(
            latent_shape=SHAPE, network=SimpleNamespace(device=torch.device("cpu")), decode=lambda x0: x0
        )


class Quadratic:
    """a x + x B x / 2: the mean over a Gaussian about x has the gradient a + B x, as the reward itself."""

    name, differentiable = "quadratic", False

    def __init__(self, curved: float) -> None:
        self.a = noise_for(11, "a", shape=SHAPE).double().flatten()
        square = noise_for(12, "b", shape=(SIZE, SIZE)).double()
        self.b = curved * (square + square.T) / SIZE

    def gradient(self, x0: torch.Tensor) -> torch.Tensor:
        return (self.a + x0.flatten(1) @ self.b).view_as(x0)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        x = images.double().flatten(1)
        return x @ self.a + ((x @ self.b) * x).sum(1) / 2


class Exponential(Quadratic):
    """exp(a x): its logarithm has the gradient a everywhere."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        return super().__call__(images, prompts).exp()


def make_window(update: int) -> Window:
    x0 = noise_for(1, "x0", update, shape=(STEPS, COUNT, *SHAPE)).double()
    states = States(torch.linspace(1, 0.25, STEPS), x0, x0)
    records = [{"prompt": str(index)} for index in range(COUNT)]
    times = torch.linspace(1, 0, STEPS + 1)
    return Window(states, {"context": torch.zeros(COUNT, 1)}, records, times, 1.0, seed=3, stage="joint", update=update)


def collect(monkeypatch, reward: Quadratic, updates: int = 8, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimated and the true gradients of many states, (S, C, H, W)."""
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, sources: reward)
    named = {"algorithm": "es", "weight": 1.0, "rewards": {"quadratic": 1.0}, "grid": 99, **settings}
    algorithm, found, true = EvolutionStrategies(EvolutionStrategiesConfig(**named), World()), [], []
    for update in range(updates):
        objective = algorithm.build_objective(make_window(update))
        ((batch,),) = objective.batches
        x0 = batch.x0.clone().requires_grad_(True)
        objective.loss(x0, batch)[0].backward()
        assert len(x0) == 32 and len({*zip(batch.step.tolist(), batch.trajectory.tolist(), strict=True)}) == 32
        found.append(-x0.grad * batch.of)
        true.append(reward.gradient(batch.x0))
    return torch.cat(found), torch.cat(true)


@pytest.mark.parametrize("reward", [Quadratic(0.0), Quadratic(1.0)], ids=["linear", "curved"])
def test_its_mean_is_the_gradient_and_its_cosine_what_so_many_pairs_can_have(monkeypatch, reward):
    pairs = 6
    found, true = collect(monkeypatch, reward, pairs=pairs)
    error = found - true
    deviations = error.mean(0) / (error.std(0) / math.sqrt(len(error)))
    print(f"mean error in standard errors: rms {float(deviations.square().mean().sqrt()):.2f}")
    assert deviations.abs().max() < 4.5 and deviations.square().mean() < 1.6
    cosines = torch.cosine_similarity(found.flatten(1), true.flatten(1))
    expected = math.sqrt(pairs / (pairs + SIZE + 1))  # |g|^2 K against |g|^2 (K + D + 1) for Gaussian noise
    print(f"cosine {float(cosines.mean()):.3f}, expected {expected:.3f}")
    assert float(cosines.mean()) == pytest.approx(expected, abs=4 * float(cosines.std()) / math.sqrt(len(cosines)))


def split(x: torch.Tensor) -> list[torch.Tensor]:
    """The cells of x (S, C, 7, 5) on a grid of 3."""
    return [cell for rows in x.split(CELLS[0], 2) for cell in rows.split(CELLS[1], 3)]


def test_on_a_coarse_grid_it_is_the_mean_over_each_cell(monkeypatch):
    """Cells at the border are smaller. Fewer numbers are estimated, so as many pairs tell more of them."""
    found, true = collect(monkeypatch, Quadratic(1.0), pairs=6, grid=3)
    assert all((cell == cell[:, :, :1, :1]).all() for cell in split(found)), "one number for each cell"
    cells = [torch.stack([cell.mean((2, 3)) for cell in split(each)], dim=1).flatten(1) for each in (found, true)]
    error = cells[0] - cells[1]
    deviations = error.mean(0) / (error.std(0) / math.sqrt(len(error)))
    assert error.shape[1] == 12 and deviations.abs().max() < 4.5
    fine, _ = collect(monkeypatch, Quadratic(1.0), pairs=6)
    noise = [float((each - true).flatten(1).square().sum(1).mean()) for each in (found, fine)]
    print(f"squared error: {noise[0]:.0f} on the grid, {noise[1]:.0f} place by place")
    assert noise[0] < noise[1]


def test_the_logarithm_is_of_the_reward(monkeypatch):
    """The logarithm of exp(a x) is linear: the estimate is exact along each noise, whatever the reward's size."""
    found, true = collect(monkeypatch, Exponential(), updates=2, pairs=6, map="log")
    linear, _ = collect(monkeypatch, Quadratic(0.0), updates=2, pairs=6)
    assert torch.allclose(found, linear, rtol=1e-6, atol=1e-6) and true.std() > 0


def test_the_control_has_the_size_and_no_direction(monkeypatch):
    found, true = collect(monkeypatch, Quadratic(0.0), pairs=6)
    control, _ = collect(monkeypatch, Quadratic(0.0), pairs=6, shuffled=True)
    cosines = [torch.cosine_similarity(each.flatten(1), true.flatten(1)) for each in (found, control)]
    error = float(cosines[1].std()) / math.sqrt(len(true))
    print(f"cosine {float(cosines[0].mean()):.3f}; of the control {float(cosines[1].mean()):.3f} +- {error:.3f}")
    assert abs(float(cosines[1].mean())) < 4 * error < float(cosines[0].mean())
    sizes = [float(each.square().sum()) for each in (found, control)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
