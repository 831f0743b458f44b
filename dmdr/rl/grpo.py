"""GRPO: group relative policy optimization (Shao et al. 2024) on the renoising steps of the few-step sampler.

1. Flow-GRPO (Liu et al. 2025) turns an ODE into an SDE to have a policy; the few-step sampler is a policy already.
2. As in the code of Flow-GRPO, log likelihoods are averaged over the elements of a latent before the ratio is taken. A
   real model has 262,144 of them; the ratio of the likelihoods themselves is 0 or infinite after one update.
3. The rollout comes from the very student that is updated. So in the first of `inner_updates` the ratio is 1; only in
   later ones it can be clipped.
4. Distribution matching takes the place of the KL to the reference (DMDR, 3.2). The KL remains for RL alone.
5. A group is the branches of one state, or, with `branches: 0`, whole trajectories of one prompt as published
   (`actions.py`). Branches of all states are divided by one deviation; states whose branches tie are left out.
6. `hybrid`: the last step, which has no action, follows the gradient of the reward itself, as in RTDMD. It has the
   scale of the policy gradient, reward / (deviation C H W): both are the gradient of one expected reward.

S states of all ranks, s of this one, G actions of each, B states of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from dmdr import losses
from dmdr.config.deal import Deal
from dmdr.config.rl import GRPO as GRPOConfig
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.actions import (
    Actions,
    branch,
    choose_states,
    follow_trajectories,
    gather_groups,
    list_own,
    list_steps,
    shuffle_if,
    split_updates,
)
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.transfer import send_to
from dmdr.update import Batch


class GRPO:
    """The clipped surrogate over the actions of RL's states.

    weights: where the rewards of the config lie. seed: of the words
    that a preference draws.

    Raises:
        ConfigError: a reward is unknown or broken, or has no gradient although `hybrid` needs one.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    trained: Mapping[str, Trainable] = MappingProxyType({})

    def __init__(
        self, config: GRPOConfig, base: SharedBase, weights: RewardSources | None = None, *, seed: int = 0
    ) -> None:
        self.config, self.base = config, base
        self.reward = Mixture(config, base.backbone, differentiable=config.hybrid, weights=weights, seed=seed)

    def build_objective(self, window: Window) -> Objective:
        if self.config.branches:
            return self.compare_branches(window)
        return self.compare_trajectories(window)

    def compare_trajectories(self, window: Window) -> Objective:
        """Groups of whole trajectories: every action of an image has the image's advantage."""
        actions_each = len(window.states.times) - 1
        rewards_PG, figures = gather_groups(self.reward, window, self.config.group_size)
        rewards_PG = shuffle_if(self.config.shuffled, rewards_PG, window)
        deal = Deal(actions_each * window.trajectories, window.trajectories, self.config.inner_updates)
        own = list_own(deal)
        pairs = window.find_pairs(deal, own, "actions", steps=actions_each)
        actions = follow_trajectories(window, self.base.backbone.path, pairs)
        images = torch.tensor([deal.find_trajectory(number) for number in own])
        advantages_s = losses.advantages(rewards_PG).flatten()[send_to(images, rewards_PG.device)]

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            return self.compute_loss(actions, advantages_s[:, None], x0, batch)

        return Objective(loss, split_updates(window, pairs, deal), figures)

    def compare_branches(self, window: Window) -> Objective:
        """Groups of branches of one state."""
        config = self.config
        deal = Deal(config.states, window.trajectories, config.inner_updates)
        steps = list_steps(window, deal, last_step=config.hybrid)
        actions, rewards_SG, figures = branch(self.base, window, deal, steps, config.branches, self.reward)
        rewards_SG = shuffle_if(config.shuffled, rewards_SG, window)
        own = send_to(torch.tensor(list_own(deal)), rewards_SG.device)
        acting = sum(step < len(window.states.times) - 1 for step in steps)
        kept = losses.find_differing(rewards_SG).sum() / acting
        advantages_sG = losses.branch_advantages(rewards_SG)[own] / kept.clamp(min=1 / deal.states)
        figures = {**figures, "differing": kept}

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            total, part = self.compute_loss(actions, advantages_sG, x0, batch)
            if config.hybrid:
                deviation = losses.deviation_of_groups(rewards_SG)
                total = total + self.follow_reward(x0, batch, window, deviation)
            return total, part

        return Objective(loss, split_updates(window, choose_states(window, deal, steps), deal), figures)

    def compute_loss(
        self, actions: Actions, advantages_sG: torch.Tensor, x0: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, Figures]:
        """The surrogate of a part of RL's states, and the KL where there is one."""
        log_ratio_BG = actions.log_prob(batch, x0) - actions.log_prob(batch, batch.x0)
        total = losses.grpo(log_ratio_BG.flatten(), advantages_sG[batch.rows].flatten(), self.config.clip_range)
        clipped_BG = ((log_ratio_BG.detach().exp() - 1).abs() > self.config.clip_range).float()
        figures = {"clipped": clipped_BG.sum() / max(clipped_BG.numel(), 1) * batch.share}
        if self.config.kl:
            reference, step = self.base.reference(batch.x_t, batch.t, batch.c), actions.find_step(batch)
            regulariser = losses.gaussian_kl(x0, reference, step.slope() / step.deviation())
            figures["loss_reference"] = regulariser.detach() * batch.share
            total = total + self.config.kl * regulariser
        return total * batch.share, figures

    def follow_reward(self, x0: torch.Tensor, batch: Batch, window: Window, deviation: torch.Tensor) -> torch.Tensor:
        """-reward / (deviation C H W), summed over the states of the last step, as their part of the mean over all."""
        last = (batch.step == len(window.states.times) - 1).nonzero().flatten()
        if not len(last):
            return x0.sum() * 0.0
        records = [window.records[index] for index in batch.trajectory[last].tolist()]
        scores = self.reward(self.base.backbone.decode(x0[send_to(last, x0.device)]), records, update=window.update)
        return -self.reward.mix(scores).sum() / (deviation * x0[0].numel()) / batch.of
