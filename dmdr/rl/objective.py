"""The interface between reinforcement learning and distribution matching, which the algorithms of this room implement.

Once per training step an algorithm sees a rollout (Window), without a graph, and builds an Objective. ReFL's is a loss
of the student's own update: it is called with the x0 that the student has just predicted, graph attached, and with the
Batch of states behind it. So is the surrogate's. The others have states of their own, on which the student runs again;
a weighting has no loss, and weighs the samples of distribution matching.

The sampler is a policy: its renoising step draws x_next ~ N(mean, deviation^2) of `rollout.Renoising`, on the flow and
the VP path alike, so likelihoods are exact. The first noise is no action, and the last step, which only predicts x0,
is deterministic: a student of N steps has N - 1 actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from dmdr.config.rl import AnyRL
from dmdr.optimizers import Trainable
from dmdr.rl.mixture import Mixture
from dmdr.rollout import Window
from dmdr.update import Batch, RLLoss, SampleWeights

Figures = dict[str, torch.Tensor]
# this rank's parts of a batch, the rows of the batch that they are, strength -> weights of the samples, figures to log
Weigh = Callable[[list[Batch], range, float], tuple[SampleWeights, Figures]]


@dataclass(frozen=True)
class Objective:
    """The RL loss of one training step, before its weight.

    loss: (x0 (B, C, H, W), batch) -> (scalar, figures to log). Both are the batch's part of the mean over the global
        batch, so parts add up. None: there is none, and `weigh` weighs the samples of distribution matching.
    batches: the states of RL's own: for each inner update, its parts. Empty: the loss is of distribution matching's.
    trust: its weight is multiplied by this, between 0 and 1; a tensor where only the device knows it.
    figures: of the whole training step.
    """

    loss: RLLoss | None
    batches: list[list[Batch]] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)
    trust: float | torch.Tensor = 1.0
    weigh: Weigh | None = None


class Algorithm(Protocol):
    """An RL algorithm over one SharedBase."""

    @property
    def reward(self) -> Mixture:
        """The rewards that it trains on."""
        ...

    @property
    def trained(self) -> Mapping[str, Trainable]:
        """Networks of its own that it trains, by the names that they have in a checkpoint."""
        ...

    def build_objective(self, window: Window) -> Objective:
        """window: distribution matching's rollout, or RL's own for an algorithm that compares whole trajectories, group
        after group."""
        ...


@dataclass(frozen=True)
class RLTerm:
    """The RL term of a training stage: the algorithm and its settings."""

    algorithm: Algorithm
    config: AnyRL

    def act_at_once(self) -> RLTerm:
        """The same without the schedule that turns it on: for runs that are too short for it."""
        return replace(self, config=self.config.model_copy(update={"start": 0, "ramp": 0}))


def summarize_scores(scores: dict[str, torch.Tensor]) -> Figures:
    """Mean and standard deviation of each reward's scores (M,)."""
    figures = {f"reward/{name}": each.mean() for name, each in scores.items()}
    return figures | {f"reward_std/{name}": each.std(correction=0) for name, each in scores.items()}
