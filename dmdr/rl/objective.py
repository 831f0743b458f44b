"""The interface between reinforcement learning and distribution matching. ReFL, DPO and GRPO implement it.

Once per training step an algorithm sees the rollout (States) and its prompts, without a graph, and builds an Objective.
The student's update calls the objective's loss with the x0 that it has just predicted, graph attached, and with the
Batch of states behind it. No algorithm runs the student a second time.

The sampler is a policy: its renoising step draws x_t' ~ N(mean, deviation^2) of `rollout.Renoising`, on the flow and
the VP path alike, so likelihoods are exact. The first noise is no action, and the last step, which only predicts x0,
is deterministic: a student of N steps has N - 1 actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dmdr import distributed
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import RL
from dmdr.path import Path, per_sample
from dmdr.rl.mixture import Mixture
from dmdr.rollout import Renoising, States
from dmdr.update import Batch, RLLoss

Figures = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The RL loss of one training step, before its weight.

    loss: (x0 (B, C, H, W), batch) -> (scalar, figures to log). Both are the batch's part of the mean over the global
        batch, so parts add up.
    blocks: (P, g) trajectories whose states of one step must stand in one batch; only these are trained on.
    figures: of the whole training step.
    """

    loss: RLLoss
    blocks: torch.Tensor
    figures: Figures = field(default_factory=dict)


class Algorithm(Protocol):
    """An RL algorithm over one SharedBase."""

    group_size: int  # images of one prompt in a rollout
    oversampling: float  # trajectories rolled out for each one that is trained on
    inner_updates: int  # student updates on one rollout
    block: int  # trajectories whose states of one step must stand in one batch
    reward: Mixture

    def build_objective(self, states: States, prompts: list[PromptRecord], *, update: int = 0) -> Objective:
        """states: N steps of M trajectories, group after group. prompts: the record of the prompt of each of the M
        trajectories. update: of
        the stage, by which a preference draws its words."""
        ...


@dataclass(frozen=True)
class RLTerm:
    """The RL term of a training stage: the algorithm and its settings."""

    algorithm: Algorithm
    config: RL


@dataclass(frozen=True)
class Actions:
    """The renoising steps that followed A of a batch's B states: x_t (A, C, H, W) -> x_next, drawn by `step`.

    mask: (B,) which states those are.
    """

    mask: torch.Tensor
    x_t: torch.Tensor
    x_next: torch.Tensor
    step: Renoising

    def log_prob(self, x0: torch.Tensor) -> torch.Tensor:
        """log N(x_next; mean, deviation^2) under a prediction x0 (A, C, H, W), summed over C, H, W: (A,)."""
        deviation = per_sample(self.step.deviation(), x0)
        z = (self.x_next - self.step.mean(self.x_t, x0)) / deviation
        return (-0.5 * z * z - deviation.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def find_actions(states: States, batch: Batch, path: Path, eta: float) -> Actions:
    """The actions of a batch. eta: of the rollout."""
    mask = batch.step < len(states.times) - 1
    after = batch.step[mask] + 1
    step = Renoising(path, batch.t[mask], states.times[after], eta)
    return Actions(mask, batch.x_t[mask], states.x_t[after, batch.trajectory[mask]], step)


def action_share(acts: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The share of the global batch's actions that lie in this batch. acts: their mask (B,).

    The mean over this batch's actions, times the share, is its part of the mean over the global batch.
    """
    return acts.sum() / max(batch.acting, 1)


def reward_groups(
    reward: Mixture, states: States, prompts: list[PromptRecord], group_size: int, *, update: int
) -> tuple[torch.Tensor, Figures]:
    """Score all samples: rewards (P, G) by group, and their figures. Each group is scored by one rank."""
    groups = distributed.split_evenly(len(prompts) // group_size)
    mine = slice(groups.start * group_size, groups.stop * group_size)
    scores_M = {
        name: distributed.all_gather(each)
        for name, each in reward.score_samples(states.x0[-1, mine], prompts[mine], group_size, update=update).items()
    }
    return reward.mix(scores_M).view(-1, group_size), summarize_scores(scores_M) | reward.list_moments(scores_M)


def summarize_scores(scores: dict[str, torch.Tensor]) -> Figures:
    """Mean and standard deviation of each reward's scores (M,)."""
    figures = {f"reward/{name}": each.mean() for name, each in scores.items()}
    return figures | {f"reward_std/{name}": each.std(correction=0) for name, each in scores.items()}
