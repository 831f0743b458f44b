"""The surrogate learns a reward whose gradient is known, and knows when it has learned nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from dmdr.config.rl import Surrogate as SurrogateConfig
from dmdr.config.shares import deal_to_rl
from dmdr.noise import noise_for
from dmdr.planning.signal import pool_fits
from dmdr.rl.surrogate import Surrogate
from dmdr.rollout import States, Window
from dmdr.update import Batch

SHAPE, STEPS, COUNT = (2, 8, 8), 4, 16
CONTEXT = noise_for(5, "context", shape=(2, 3, 12))  # two prompts of three tokens


class World:
    """What the surrogate asks of a shared base: latents are images, and a prompt is its number."""

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(
            latent_shape=SHAPE,
            network=SimpleNamespace(device=torch.device("cpu")),
            decode=lambda x0: x0,
            blank=lambda: {"context": CONTEXT[0]},
        )


class Contrast:
    """Prompt "0" wants the left half bright, any other the right half: the gradient is known."""

    name, differentiable = "contrast", False

    def direction(self, prompts: list[str]) -> torch.Tensor:
        left = torch.ones(SHAPE)
        left[:, :, 4:] = -1.0
        return torch.stack([left if prompt == "0" else -left for prompt in prompts])

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        return (images * self.direction(prompts)).mean(dim=(1, 2, 3)) + 3.0


class Lottery(Contrast):
    """No image is better than another."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        return torch.rand(len(images), generator=self.generator)


def make_window(update: int) -> Window:
    """Smooth random x0: a brightness of its own for each quarter, and a little noise."""
    quarters = noise_for(1, "x0", update, shape=(STEPS, COUNT, SHAPE[0], 2, 2))
    x0 = quarters.repeat_interleave(4, 3).repeat_interleave(4, 4)
    x0 = x0 + 0.3 * noise_for(2, "x0", update, shape=tuple(x0.shape))
    number = [index % 2 for index in range(COUNT)]
    states = States(torch.linspace(1, 0.25, STEPS), x0, x0)
    records = [{"prompt": str(each)} for each in number]
    times = torch.linspace(1, 0, STEPS + 1)
    return Window(states, {"context": CONTEXT[number]}, records, times, 1.0, seed=3, stage="joint", update=update)


def fit(monkeypatch, reward: Contrast, updates: int) -> tuple[Surrogate, list[float], list[float]]:
    """The surrogate after so many updates, and at each its fit on fresh samples and the trust in it."""
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, sources: reward)
    config = SurrogateConfig(algorithm="surrogate", weight=1.0, rewards={"contrast": 1.0}, width=16, learning_rate=3e-3)
    surrogate, fits, trusts = Surrogate(config, World()), [], []
    for update in range(updates):
        objective = surrogate.build_objective(make_window(update))
        fits.append(float(objective.figures["surrogate_fit"]))
        trusts.append(objective.trust)
    return surrogate, fits, trusts


def test_it_recovers_the_direction_of_a_known_gradient(monkeypatch):
    reward = Contrast()
    surrogate, fits, trusts = fit(monkeypatch, reward, 40)
    assert trusts[0] < 0.05 and fits[-1] > 0.8 and trusts[-1] == pytest.approx(fits[-1])
    window = make_window(1000)
    x0 = window.states.x0[0].requires_grad_(True)
    rows = torch.arange(COUNT)
    batch = Batch(x0, x0, torch.ones(COUNT), window.c, rows * 0, rows, slice(0, COUNT), of=COUNT)
    loss, _ = surrogate.compute_loss(x0, batch)
    loss.backward()
    towards = -x0.grad.flatten(1)
    cosine = torch.cosine_similarity(
        towards, reward.direction([record["prompt"] for record in window.records]).flatten(1)
    ).mean()
    print(f"fit {fits[-1]:.3f}, cosine with the reward's own gradient {float(cosine):.3f}")
    assert cosine > 0.5, "a random direction has 0.09"
    trained = [*surrogate.network.parameters(), *surrogate.average.parameters()]
    assert all(each.grad is None for each in trained), "the student's loss does not train it"


def test_the_fit_of_several_updates_is_the_share_of_variance_on_scores_not_seen(monkeypatch):
    """Beside what its predictions explain before it learns from them, by hand."""
    reward = Contrast()
    surrogate, _, _ = fit(monkeypatch, reward, 40)
    found, squares = [], [0.0, 0.0]
    for update in range(40, 44):
        window = make_window(update)
        before = copy.deepcopy(surrogate.average)
        surrogate.build_objective(window)
        found.append(torch.stack(surrogate.network.last_errors()))
        moments = surrogate.network.records["moments"]
        x0, c, records = surrogate.draw_samples(window, deal_to_rl(surrogate.config, STEPS, COUNT))
        scores = ((reward(x0, [each["prompt"] for each in records]) - moments[0]) / moments[1]).detach()
        with torch.no_grad():
            errors = before(x0, c) - scores
        squares = [
            squares[0] + float(errors.square().sum()),
            squares[1] + float((scores - scores.mean()).square().sum()),
        ]
    assert pool_fits(found) == pytest.approx(1 - squares[0] / squares[1], abs=1e-4)
    assert pool_fits(found) > 0.8
    assert pool_fits([]) is None and pool_fits([torch.tensor([1.0, 0.0])]) is None


def test_where_there_is_nothing_to_learn_it_has_no_weight(monkeypatch):
    _, fits, trusts = fit(monkeypatch, Lottery(), 30)
    print(f"fits {[round(each, 2) for each in fits]}")
    assert max(trusts[8:]) < 0.1, "its fit on samples that it has seen is no proof"
