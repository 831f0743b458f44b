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

S states, G actions of each, B states of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from dmdr import losses
from dmdr.config.rl import GRPO as GRPOConfig
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.actions import Actions, branch, choose_states, follow_trajectories, gather_groups, split_updates
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
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
        steps, count = window.states.x0.shape[:2]
        rewards_PG, figures = gather_groups(self.reward, window, self.config.group_size)
        pairs = torch.randperm((steps - 1) * count, generator=window.generator("actions"))
        actions = follow_trajectories(window, self.base.backbone.path, pairs)
        advantages_S = losses.advantages(rewards_PG).flatten()[pairs % count]
        batches = split_updates(window, pairs, self.config.inner_updates)

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            return self.compute_loss(actions, advantages_S[:, None], x0, batch)

        return Objective(loss, batches, figures)

    def compare_branches(self, window: Window) -> Objective:
        """Groups of branches of one state."""
        config = self.config
        pairs = choose_states(window, config.states, last_step=config.hybrid)
        actions, rewards_SG, figures = branch(self.base, window, pairs, config.branches, self.reward)
        order = torch.randperm(len(pairs), generator=window.generator("actions"))
        pairs, rewards_SG = pairs[order], rewards_SG[order]
        actions = Actions(actions.x_next[order], actions.t_next[order], actions.path, actions.eta)
        advantages_SG, differ_S = losses.branch_advantages(rewards_SG), losses.find_differing(rewards_SG)
        acting_S = pairs // window.states.x0.shape[1] < len(window.states.times) - 1
        kept = float(differ_S.sum()) / float(acting_S.sum())
        figures = {**figures, "differing": rewards_SG.new_tensor(kept)}

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            total, part = self.compute_loss(actions, advantages_SG / max(kept, 1 / len(pairs)), x0, batch)
            if config.hybrid:
                deviation = losses.deviation_of_groups(rewards_SG)
                total = total + self.follow_reward(x0, batch, window, deviation)
            return total, part

        return Objective(loss, split_updates(window, pairs, config.inner_updates), figures)

    def compute_loss(
        self, actions: Actions, advantages_SG: torch.Tensor, x0: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, Figures]:
        """The surrogate of a part of RL's states, and the KL where there is one."""
        log_ratio_BG = actions.log_prob(batch, x0) - actions.log_prob(batch, batch.x0)
        total = losses.grpo(log_ratio_BG.flatten(), advantages_SG[batch.rows].flatten(), self.config.clip_range)
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
        scores = self.reward(self.base.backbone.decode(x0[last]), records, update=window.update)
        return -self.reward.mix(scores).sum() / (deviation * x0[0].numel()) / batch.of
