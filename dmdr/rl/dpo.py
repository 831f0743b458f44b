"""DPO: direct preference optimization (Rafailov et al. 2023) on the student's own samples.

1. The winner and the loser of a group are its best and its worst by reward; no pairs are collected beforehand. A group
   is the branches of one state, or, with `branches: 0`, whole trajectories of one prompt (`actions.py`).
2. Preferences are over actions (D3PO, Yang et al. 2024): each renoising step compares the likelihood ratios, student to
   reference, of the winner's and the loser's action. They are exact here. Diffusion-DPO (Wallace et al. 2024) bounds
   them by denoising errors, because the ratio of a multi-step teacher is out of reach.
3. Log likelihoods are averaged over the elements of a latent, as in grpo.py; `beta` has that unit.
4. The reference is the student of the cold start. It is DPO's own regulariser, with distribution matching or without.

P pairs of one step each, S states: of branches one for a pair, of trajectories two, the winner's first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from dmdr import losses
from dmdr.config.rl import DPO as DPOConfig
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.actions import Actions, branch, choose_states, follow_trajectories, gather_groups, split_updates
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
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
        steps, count = window.states.x0.shape[:2]
        rewards_PG, figures = gather_groups(self.reward, window, self.config.group_size)
        first = torch.arange(0, count, self.config.group_size)
        best, worst = first + rewards_PG.argmax(1).cpu(), first + rewards_PG.argmin(1).cpu()
        blocks = torch.stack([best, worst], dim=1)  # (P, 2)
        order = torch.randperm((steps - 1) * len(blocks), generator=window.generator("actions"))
        step, group = order // len(blocks), order % len(blocks)
        pairs = (step[:, None] * count + blocks[group]).flatten()
        actions = follow_trajectories(window, self.base.backbone.path, pairs)
        return self.prefer(window, pairs, actions, losses.find_differing(rewards_PG)[group], figures)

    def compare_branches(self, window: Window) -> Objective:
        """Pairs of the best and the worst branch of a state."""
        pairs = choose_states(window, self.config.states)
        actions, rewards_SG, figures = branch(self.base, window, pairs, self.config.branches, self.reward)
        chosen = torch.stack([rewards_SG.argmax(1), rewards_SG.argmin(1)], dim=1)  # (S, 2)
        rows = torch.arange(len(pairs), device=chosen.device)[:, None]
        actions = replace(actions, x_next=actions.x_next[rows, chosen])
        return self.prefer(window, pairs, actions, losses.find_differing(rewards_SG), figures)

    def prefer(
        self, window: Window, pairs: torch.Tensor, actions: Actions, ranked_P: torch.Tensor, figures: Figures
    ) -> Objective:
        """The objective of pairs of actions, the winner's first. ranked_P: whether their rewards differ; the mean is
        over the pairs that do."""
        block = len(pairs) // len(ranked_P)  # states of a pair
        kept = float(ranked_P.sum()) / len(ranked_P)

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            reference = self.base.reference(batch.x_t, batch.t, batch.c)
            log_ratio = actions.log_prob(batch, x0) - actions.log_prob(batch, reference)
            gain_w_P, gain_l_P = log_ratio.view(-1, 2).unbind(1)
            mine = ranked_P[batch.rows.start // block : batch.rows.stop // block]
            share = batch.share / max(kept, 1 / len(ranked_P))
            total = losses.dpo(gain_w_P, gain_l_P, self.config.beta, mine) * share
            prefers_P = (gain_w_P.detach() > gain_l_P.detach()).float() * mine
            return total, {"prefers_winner": prefers_P.sum() / max(len(prefers_P), 1) * share}

        batches = split_updates(window, pairs, 1, block=block)
        return Objective(loss, batches, {**figures, "differing": window.times.new_tensor(kept)})
