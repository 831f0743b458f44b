"""DPO: direct preference optimization (Rafailov et al. 2023) on the student's own samples.

1. The winner and the loser of a group are its best and its worst by reward; no pairs are collected beforehand. A group
   is the branches of one state, or, with `branches: 0`, whole trajectories of one prompt (`actions.py`).
2. Preferences are over actions (D3PO, Yang et al. 2024): each renoising step compares the likelihood ratios, student to
   reference, of the winner's and the loser's action. They are exact here. Diffusion-DPO (Wallace et al. 2024) bounds
   them by denoising errors, because the ratio of a multi-step teacher is out of reach.
3. Log likelihoods are averaged over the elements of a latent, as in grpo.py; `beta` has that unit.
4. The reference is the student of the cold start. It is DPO's own regulariser, with distribution matching or without.

P pairs of one step each, p of this rank, S states: of branches one for a pair, of trajectories two, the winner's first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from dmdr import losses
from dmdr.config.deal import Deal
from dmdr.config.rl import DPO as DPOConfig
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


class DPO:
    """The preference loss over pairs of actions.

    weights: where the rewards of the config lie. seed: of the words
    that a preference draws.

    Raises:
        ConfigError: a reward is unknown or broken.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    trained: Mapping[str, Trainable] = MappingProxyType({})

    def __init__(
        self, config: DPOConfig, base: SharedBase, weights: RewardSources | None = None, *, seed: int = 0
    ) -> None:
        self.config, self.base = config, base
        self.reward = Mixture(config, base.backbone, differentiable=False, weights=weights, seed=seed)

    def build_objective(self, window: Window) -> Objective:
        if self.config.branches:
            return self.compare_branches(window)
        return self.compare_trajectories(window)

    def compare_trajectories(self, window: Window) -> Objective:
        """Pairs of the best and the worst image of a prompt, at each of their actions."""
        actions_each, size = len(window.states.times) - 1, self.config.group_size
        rewards_PG, figures = gather_groups(self.reward, window, size)
        rewards_PG = shuffle_if(self.config.shuffled, rewards_PG, window)
        deal = Deal(
            actions_each * len(rewards_PG), len(rewards_PG)
        )  # pairs of images, as many of each group as actions
        own = list_own(deal)
        groups = [deal.find_trajectory(number) for number in own]
        steps = [deal.find_turn(number) for number in own]
        firsts = window.locate([group * size for group in groups])
        group, step, first = send_to(torch.tensor([groups, steps, firsts]), rewards_PG.device)
        chosen = torch.stack([rewards_PG.argmax(1), rewards_PG.argmin(1)], dim=1)[group] + first[:, None]  # (p, 2)
        pairs = (step[:, None] * window.states.x0.shape[1] + chosen).flatten()
        actions = follow_trajectories(window, self.base.backbone.path, pairs)
        return self.prefer(
            split_updates(window, pairs, deal, block=2), actions, losses.find_differing(rewards_PG), group, figures
        )

    def compare_branches(self, window: Window) -> Objective:
        """Pairs of the best and the worst branch of a state."""
        deal = Deal(self.config.states, window.trajectories)
        steps = list_steps(window, deal)
        actions, rewards_SG, figures = branch(self.base, window, deal, steps, self.config.branches, self.reward)
        rewards_SG = shuffle_if(self.config.shuffled, rewards_SG, window)
        own = send_to(torch.tensor(list_own(deal)), rewards_SG.device)
        chosen = torch.stack([rewards_SG.argmax(1), rewards_SG.argmin(1)], dim=1)[own]  # (s, 2)
        rows = torch.arange(len(own), device=chosen.device)[:, None]
        actions = replace(actions, x_next=actions.x_next[rows, chosen])
        batches = split_updates(window, choose_states(window, deal, steps), deal)
        return self.prefer(batches, actions, losses.find_differing(rewards_SG), own, figures)

    def prefer(
        self,
        batches: list[list[Batch]],
        actions: Actions,
        differ: torch.Tensor,
        of_pair: torch.Tensor,
        figures: Figures,
    ) -> Objective:
        """The objective of pairs of actions, the winner's first.

        differ: whether the rewards of each group of all ranks differ; the mean is over those that do. of_pair: (p,) the
        group of each of this rank's pairs.
        """
        ranked_p, kept = differ[of_pair], differ.sum() / len(differ)
        block = len(actions.t_next) // len(ranked_p)  # states of a pair

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            reference = self.base.reference(batch.x_t, batch.t, batch.c)
            log_ratio = actions.log_prob(batch, x0) - actions.log_prob(batch, reference)
            gain_w_P, gain_l_P = log_ratio.view(-1, 2).unbind(1)
            mine = ranked_p[batch.rows.start // block : batch.rows.stop // block]
            share = batch.share / kept.clamp(min=1 / len(differ))
            total = losses.dpo(gain_w_P, gain_l_P, self.config.beta, mine) * share
            prefers_P = (gain_w_P.detach() > gain_l_P.detach()).float() * mine
            return total, {"prefers_winner": prefers_P.sum() / max(len(prefers_P), 1) * share}

        return Objective(loss, batches, {**figures, "differing": kept})
