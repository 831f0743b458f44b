"""The cosine of two halves of RL's batch, beside gradients taken another way, and what it tells of a signal."""

from __future__ import annotations

import pytest
import torch

from dmdr.config.rl import GRPO as GRPOConfig
from dmdr.draws import roll_out_prompts
from dmdr.rl.grpo import GRPO
from dmdr.watch.halves import RL_HALVES, compare_halves
from tests.unit.dmdr.rl.test_algorithms import made
from tests.unit.dmdr.rl.test_branches import LinearReward, LinearWorld, roll_out


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "grpo-branches", "dpo-branches"])
def test_it_is_the_cosine_of_the_gradients_of_two_halves(tiny_sd3_folder, algorithm):
    """One of the ways to cut the groups into two halves gives the same cosine; nothing is left behind."""
    run, state = made(tiny_sd3_folder, algorithm, rank=4)
    window = roll_out_prompts(run, 0)[1]
    objective = run.rl.algorithm.build_objective(window)
    group = run.batch_rl.group
    before = {name: each.detach().clone() for name, each in run.base.student_parameters.items()}
    found = float(compare_halves(run.base, window, objective, group=group)[RL_HALVES])
    assert all(torch.equal(each, before[name]) for name, each in run.base.student_parameters.items())
    assert all(each.grad is None for each in run.base.student_parameters.values())
    groups = window.trajectories // group
    gradients = [find_of_group(run, objective, number, group) for number in range(groups)]
    cosines = []
    for chosen in torch.combinations(torch.arange(groups), groups // 2):
        one = sum(gradients[int(number)] for number in chosen)
        other = sum(gradients) - one
        if one.norm() * other.norm() > 0:
            cosines.append(float(one @ other / (one.norm() * other.norm())))
    assert cosines, "no half has a gradient"
    assert any(found == pytest.approx(each, abs=1e-6) for each in cosines), (found, cosines)


def find_of_group(run, objective, number: int, group: int) -> torch.Tensor:
    """The gradient of the whole loss, with the x0 of all other groups held fast."""
    parameters = list(run.base.student_parameters.values())
    total = torch.zeros(())
    for batch in (batch for parts in objective.batches for batch in parts):
        x0 = run.base.student(batch.x_t, batch.t, batch.c)
        mine = (batch.trajectory // group == number)[:, None, None, None]
        total = total + objective.loss(torch.where(mine, x0, x0.detach()), batch)[0]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat([each.flatten() for each in gradients if each is not None])


def test_it_is_above_0_with_a_signal_and_0_without(monkeypatch):
    reward = LinearReward()
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, sources: reward)
    world = LinearWorld()
    world.student_parameters = {"theta": world.theta}
    means = {}
    for shuffled in (False, True):
        named = {"algorithm": "grpo", "weight": 1.0, "rewards": {"linear": 1.0}, "branches": 6, "states": 12}
        algorithm, found = GRPO(GRPOConfig(**named, shuffled=shuffled), world), []
        for update in range(60):
            window = roll_out(world, update)
            objective = algorithm.build_objective(window)
            found.append(float(compare_halves(world, window, objective, group=1)[RL_HALVES]))
        error = torch.tensor(found).std() / len(found) ** 0.5
        means[shuffled] = float(torch.tensor(found).mean() / error)
    print(f"mean cosine in standard errors: {means[False]:.1f}, shuffled {means[True]:.1f}")
    assert means[False] > 4 and abs(means[True]) < 3
