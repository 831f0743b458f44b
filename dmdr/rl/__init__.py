"""Reinforcement learning beside distribution matching, one file an algorithm: refl, dpo, grpo.

The seam: once a window, an algorithm looks at the rollout (States) and its prompts, without a graph, and returns an
Objective; the student's update calls it with the x0 that it has just predicted, graph attached, and the Batch of states
it was predicted at. No algorithm runs the student a second time.

The sampler is a policy: its renoising step from t to t' draws x_t' ~ N(signal(t') x0(x_t), spread(t')^2), on the flow
and the VP path alike, so that likelihoods are exact. The first noise is no action, and the last step, which only
predicts x0, is deterministic: a student of N steps has N - 1 actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dmdr import distributed
from dmdr.path import Path, per_sample
from dmdr.rewards.mixture import Mixture
from dmdr.rollout import States
from dmdr.update import Batch

Figures = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss of one window, before its weight: (x0 (B, C, H, W), batch) -> (scalar, figures to log). The scalar is
    this rank's part of the mean over all ranks; figures are of all ranks.

    blocks (P, g): trajectories whose states of one step must stand in one batch; they alone are trained on.
    """

    loss: Callable[[torch.Tensor, Batch], tuple[torch.Tensor, Figures]]
    blocks: torch.Tensor


class Algorithm(Protocol):
    """An RL algorithm; made by stages/joint.py."""

    group_size: int  # images of one prompt in a rollout
    unused: float  # trajectories rolled out for each one that is trained on
    inner_updates: int  # student updates on one rollout
    block: int  # trajectories whose states of one step must stand in one batch

    def look(self, states: States, prompts: list[str]) -> Objective:
        """states: N steps of M trajectories, groups one after another; prompts: of the M trajectories."""


def log_prob(path: Path, x_next: torch.Tensor, x0: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
    """log N(x_next; signal x0, spread^2), summed over C, H, W: (B,). t_next (B,) above 0."""
    signal, spread = (per_sample(each, x0) for each in path.signal_and_spread(t_next))
    z = (x_next - signal * x0) / spread
    return (-0.5 * z * z - spread.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def actions(states: States, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which states (B,) were followed by a renoising step, and what it drew: x_next and t_next of those."""
    acts = batch.step < len(states.times) - 1
    after = batch.step[acts] + 1
    return acts, states.x_t[after, batch.trajectory[acts]], states.times[after]


def share(acts: torch.Tensor) -> torch.Tensor:
    """What turns a mean over these actions (B,) into their part of the mean over the actions of all ranks."""
    count = acts.sum()
    return count / distributed.total(count).clamp(min=1)


def rewarded(reward: Mixture, states: States, prompts: list[str], group_size: int) -> tuple[torch.Tensor, Figures]:
    """The rewards (P, G) of the samples of all groups, each group scored by one rank, and their figures."""
    groups = distributed.share(len(prompts) // group_size)
    mine = slice(groups.start * group_size, groups.stop * group_size)
    rewards_PG, figures = reward.of_samples(states.x0[-1, mine], prompts[mine], group_size)
    return distributed.gather(rewards_PG), of_all_ranks(figures, rewards_PG.numel())


def of_all_ranks(figures: Figures, count: int) -> Figures:
    """reward/NAME and reward_std/NAME of `count` samples here, as those of the samples of all ranks."""
    if distributed.ranks() == 1:
        return figures
    means = {name: each.double() for name, each in figures.items() if name.startswith("reward/")}
    spreads = {name: figures[name.replace("reward/", "reward_std/")].double() for name in means}
    moments = {name: torch.stack([mean, spreads[name].square() + mean.square()]) for name, mean in means.items()}
    weight = count / distributed.total(torch.tensor(count)).item()
    sums = distributed.total(torch.stack(list(moments.values())) * weight)
    found = dict(zip(means, sums[:, 0], strict=True))
    of_squares = dict(zip(means, sums[:, 1], strict=True))
    return found | {
        name.replace("reward/", "reward_std/"): (of_squares[name] - mean.square()).clamp(min=0).sqrt()
        for name, mean in found.items()
    }
