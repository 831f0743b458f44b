"""Branches in a world whose policy gradient is known: a linear student, a linear reward, Gaussian noise.

x0 = theta + a x_t at every step, and the reward is w . x0 of the last. So a change of x0 at step k moves the reward by
w times the slope of all that follows, which is the analytic gradient.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dmdr import losses
from dmdr.config.batches import count_rl, count_student_forwards
from dmdr.config.deal import Deal
from dmdr.config.rl import GRPO as GRPOConfig
from dmdr.noise import noise_for
from dmdr.path import FlowPath
from dmdr.rl.actions import branch, choose_states, list_own, list_steps, shuffle_if, split_updates
from dmdr.rl.grpo import GRPO
from dmdr.rollout import Window, simulate_backward

TIMES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
STEPS, SHAPE, SLOPE = 4, (1, 2, 2), 0.6
PROMPTS = 32


class LinearWorld:
    """What RL asks of a shared base: a student with one parameter tensor; an image is its latent."""

    def __init__(self) -> None:
        self.theta = noise_for(1, "theta", shape=SHAPE).double().requires_grad_(True)
        self.backbone = SimpleNamespace(
            latent_shape=SHAPE,
            path=FlowPath(),
            network=SimpleNamespace(device=torch.device("cpu")),
            decode=lambda x0: x0,
        )

    def student(self, x_t: torch.Tensor, t: torch.Tensor, c: dict) -> torch.Tensor:
        return self.theta + SLOPE * x_t


class LinearReward:
    name, differentiable = "linear", True

    def __init__(self) -> None:
        self.w = noise_for(2, "w", shape=SHAPE).double()

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        return (images * self.w).sum(dim=(1, 2, 3))


@pytest.fixture
def reward(monkeypatch) -> LinearReward:
    found = LinearReward()
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, sources: found)
    return found


def roll_out(world: LinearWorld, update: int, *, count: int = PROMPTS, group: int = 1) -> Window:
    noises = noise_for(3, "rollout", update, shape=(STEPS, count, *SHAPE)).double()
    states = simulate_backward(
        lambda x_t, t: world.student(x_t, t, {}), world.backbone, times=TIMES, noises=noises, eta=1.0
    )
    records = [{"prompt": f"prompt {index // group}"} for index in range(count)]
    return Window(states, {}, records, TIMES, 1.0, seed=3, stage="joint", update=update)


def find_gradients(world: LinearWorld, algorithm: GRPO, updates: int, **window: int) -> torch.Tensor:
    """The gradient of the loss in theta at each of `updates` updates: (updates, D)."""
    found = []
    for update in range(updates):
        objective = algorithm.build_objective(roll_out(world, update, **window))
        total = torch.zeros(())
        for parts in objective.batches:
            for batch in parts:
                total = total + objective.loss(world.student(batch.x_t, batch.t, batch.c), batch)[0]
        found.append(torch.autograd.grad(total, world.theta)[0].flatten())
    return torch.stack(found)


def slopes() -> torch.Tensor:
    """d (last x0) / d (x0 of step k) for k = 0 .. N - 1."""
    signals = 1 - TIMES[1:-1]
    return torch.tensor([float((SLOPE * signals[k:]).prod()) for k in range(STEPS)], dtype=torch.float64)


def expect_gradient(w: torch.Tensor, branches: int, *, hybrid: bool = False) -> torch.Tensor:
    """The gradient of -reward / (deviation D) in theta, its mean over the steps, (1 - 1 / G) of each action's."""
    kept, spreads, signals = 1 - 1 / branches, TIMES[1:-1], 1 - TIMES[1:-1]
    moved = slopes()[:-1] / signals * spreads * w.norm()  # the deviation of the reward by one draw of noise
    deviation = (kept * moved.square().mean()).sqrt()
    by_step = torch.cat([kept * slopes()[:-1], slopes()[-1:]]) if hybrid else kept * slopes()[:-1]
    return -by_step.mean() * w.flatten() / (deviation * w.numel())


@pytest.mark.parametrize("hybrid", [False, True], ids=["branches", "hybrid"])
def test_the_gradient_of_branches_is_the_analytic_one(reward, hybrid):
    """Within 3 standard errors, in each element and along the reward's own direction."""
    world = LinearWorld()
    settings = {"branches": 6, "states": 24, "hybrid": hybrid}
    algorithm = GRPO(GRPOConfig(algorithm="grpo", weight=1.0, rewards={"linear": 1.0}, **settings), world)
    gradients = find_gradients(world, algorithm, 150)
    expected = expect_gradient(reward.w, 6, hybrid=hybrid)
    error = gradients.std(0) / len(gradients) ** 0.5
    print(f"mean {gradients.mean(0).tolist()}, expected {expected.tolist()}, standard error {error.tolist()}")
    # one deviation of 24 groups, on average over draws, is a little smaller than that of all
    assert ((gradients.mean(0) - expected).abs() < 3 * error + 0.02 * expected.abs()).all()
    assert float(error.norm()) < 0.1 * float(expected.norm()), "too few draws to tell"


def test_branches_have_less_variance_than_whole_images_at_the_same_forwards(reward):
    """Sampled and trained samples alike, a trained one as 3 forwards; signal to noise along the reward's direction."""
    world, named = LinearWorld(), {"algorithm": "grpo", "weight": 1.0, "rewards": {"linear": 1.0}}
    branching = GRPOConfig(**named, branches=8, states=24)
    whole = GRPOConfig(**named, branches=0, batch=40, group_size=8)
    costs = [count_student_forwards(each, STEPS) + 3 * count_rl(each, STEPS).states for each in (branching, whole)]
    assert costs == [8 * 24 * 2 + 3 * 24, 40 * 4 + 3 * 40 * 3] and costs[0] < costs[1]
    of_branches = find_gradients(world, GRPO(branching, world), 100)
    of_images = find_gradients(world, GRPO(whole, world), 100, count=40, group=8)
    direction = reward.w.flatten() / reward.w.norm()
    ratios = []
    for gradients in (of_branches, of_images):
        mean = -gradients.mean(0) @ direction
        ratios.append(float(mean.square() / gradients.var(0).sum()))
    print(f"squared mean over variance: branches {ratios[0]:.3f}, whole images {ratios[1]:.3f}")
    assert ratios[0] > 3 * ratios[1] > 0


@pytest.mark.parametrize(
    ("form", "window"),
    [({"branches": 6, "states": 24}, {}), ({"branches": 0, "batch": 24, "group_size": 6}, {"count": 24, "group": 6})],
    ids=["branches", "whole images"],
)
def test_shuffled_rewards_give_a_gradient_of_the_same_size_without_a_direction(reward, form, window):
    world, named = LinearWorld(), {"algorithm": "grpo", "weight": 1.0, "rewards": {"linear": 1.0}}
    with_signal = find_gradients(world, GRPO(GRPOConfig(**named, **form), world), 150, **window)
    control = GRPO(GRPOConfig(**named, **form, shuffled=True), world)
    without = find_gradients(world, control, 150, **window)
    direction = reward.w.flatten() / reward.w.norm()
    along = [-(gradients @ direction) for gradients in (with_signal, without)]
    scores = [float(each.mean() / (each.std() / len(each) ** 0.5)) for each in along]
    across = [(gradients + each[:, None] * direction).norm(dim=1).square().mean().sqrt() for gradients, each in
              zip((with_signal, without), along, strict=True)]  # fmt: skip
    print(f"mean along the reward in standard errors {scores}; sizes across it {[float(each) for each in across]}")
    assert scores[0] > 6 and abs(scores[1]) < 3
    assert across[1] == pytest.approx(float(across[0]), rel=0.15)
    assert torch.equal(find_gradients(world, control, 2, **window), without[:2]), "a function of seed and update alone"


def test_a_shuffled_group_keeps_its_rewards(reward):
    """So that its mean, its deviation and its ties stay. Another update deals them otherwise."""
    world, rewards_SG = LinearWorld(), torch.arange(60.0).view(10, 6)
    windows = [roll_out(world, update) for update in (0, 1)]
    dealt = [shuffle_if(True, rewards_SG, window) for window in windows]
    assert all(torch.equal(each.sort(1).values, rewards_SG) for each in dealt)
    assert not torch.equal(*dealt) and len({tuple(row.tolist()) for row in dealt[0] % 6}) > 5
    assert shuffle_if(False, rewards_SG, windows[0]) is rewards_SG


def test_each_step_has_its_share_of_the_states_that_branch():
    world, found = LinearWorld(), torch.zeros(3)
    for update in range(30):
        window, deal = roll_out(world, update), Deal(10, PROMPTS)
        pairs = choose_states(window, deal, list_steps(window, deal))
        counts = torch.bincount(pairs // PROMPTS, minlength=3)
        assert sorted(counts.tolist()) == [3, 3, 4] and (pairs % PROMPTS).unique().numel() == 10
        again = choose_states(window, deal, list_steps(window, deal))
        assert torch.equal(pairs, again), "a function of seed and update alone"
        found += counts
    assert found.min() > 92, "none is left out in the long run"
    eight = Deal(8, PROMPTS)
    steps = list_steps(window, eight, last_step=True)
    assert torch.bincount(choose_states(window, eight, steps) // PROMPTS).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("states", "inner"), [(24, 3), (24, 2), (18, 6), (27, 4)])
def test_each_inner_update_sees_each_step(states, inner):
    """Also where the number of steps and of inner updates share a factor."""
    window, deal = roll_out(LinearWorld(), 0), Deal(states, PROMPTS, inner)
    steps, own = list_steps(window, deal), list_own(deal)
    assert sorted(own) == list(range(states))
    assert {steps.count(step) for step in range(3)} == {states // 3}
    for parts in split_updates(window, choose_states(window, deal, steps), deal):
        assert set(torch.cat([part.step for part in parts]).tolist()) == {0, 1, 2}


def test_branches_of_a_state_differ_by_one_draw_of_noise_alone(reward):
    """Two branches whose fresh noise is the same would end alike: the later noise is common."""
    world = LinearWorld()
    window = roll_out(world, 0)
    deal = Deal(6, PROMPTS)
    steps = list_steps(window, deal)
    algorithm = GRPO(GRPOConfig(algorithm="grpo", weight=1.0, rewards={"linear": 1.0}, states=6), world)
    actions, rewards_SG, _ = branch(world, window, deal, steps, 4, algorithm.reward)
    step = torch.tensor(steps)
    later = slopes()[step] / (1 - TIMES[step + 1])  # d (last x0) / d (x_next)
    moved = later[:, None] * ((actions.x_next - actions.x_next[:, :1]) * reward.w).flatten(2).sum(2)
    assert torch.allclose(rewards_SG - rewards_SG[:, :1], moved)


def test_groups_that_tie_are_left_out_and_none_is_inflated():
    rewards_SG = torch.tensor([[0.0, 2.0], [0.5, 0.5], [0.0, 0.2]])
    advantages = losses.branch_advantages(rewards_SG)
    deviation = ((1.0 + 0.01) / 2) ** 0.5
    assert advantages.flatten().tolist() == pytest.approx(
        [-1 / deviation, 1 / deviation, 0, 0, -0.1 / deviation, 0.1 / deviation]
    )
    assert losses.find_differing(rewards_SG).tolist() == [True, False, True]
    assert not losses.branch_advantages(torch.full((2, 3), 0.3)).any()
