"""GRPO: group relative policy optimization (Shao et al. 2024) on the renoising steps of the few-step sampler.

1. Flow-GRPO (Liu et al. 2025) turns an ODE into an SDE to have a policy; the few-step sampler is one already.
2. As in its code, the ratio is of likelihoods averaged over the elements of a latent: with a real model's 262,144 of
   them the ratio of the likelihoods themselves is 0 or infinite after one update.
3. The rollout is of the student that is updated, so the ratio is 1 in the first of `inner_updates` and clips later.
4. Distribution matching takes the place of the KL to the reference (DMDR, 3.2), which is there for RL alone.

P prompts, G images of each, B states of which A were followed by an action.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmdr import losses
from dmdr.config.run import GRPO as GRPOConfig
from dmdr.rewards.mixture import Mixture
from dmdr.rl.objective import Figures, Objective, action_share, find_actions, log_prob, reward_groups
from dmdr.rollout import States
from dmdr.shared_base import SharedBase
from dmdr.update import Batch


class GRPO:
    """The RL loss of a batch: the clipped surrogate over the actions of its states.

    Raises:
        ConfigError: a reward is unknown or broken.
    """

    oversampling, block = 1.0, 1

    def __init__(self, config: GRPOConfig, base: SharedBase, weights: Mapping[str, str] | None = None) -> None:
        self.base, self.kl, self.clip_range = base, config.kl, config.clip_range
        self.group_size, self.inner_updates = config.group_size, config.inner_updates
        self.reward = Mixture(config.rewards, base.backbone, differentiable=False, weights=weights)

    def build_objective(self, states: States, prompts: list[str]) -> Objective:
        rewards_PG, figures = reward_groups(self.reward, states, prompts, self.group_size)
        advantages_M = losses.advantages(rewards_PG).flatten()
        path = self.base.backbone.path

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            acts, x_next, t_next = find_actions(states, batch)
            new_A = log_prob(path, x_next, x0[acts], t_next)
            old_A = log_prob(path, x_next, batch.x0[acts], t_next)
            log_ratio_A = (new_A - old_A) / x0[0].numel()
            part = losses.grpo(log_ratio_A, advantages_M[batch.trajectory[acts]], self.clip_range)
            clipped = ((log_ratio_A.detach().exp() - 1).abs() > self.clip_range).float()
            found = {"clipped": clipped.sum() / max(len(clipped), 1) * action_share(acts, batch)}
            if self.kl:
                reference = self.base.reference(batch.x_t, batch.t, batch.c)
                signal, spread = path.signal_and_spread(t_next)
                regulariser = losses.gaussian_kl(x0[acts], reference[acts], signal / spread)
                found["loss_reference"] = regulariser.detach() * action_share(acts, batch)
                part = part + self.kl * regulariser
            return part * action_share(acts, batch), found

        return Objective(loss, torch.arange(len(prompts))[:, None], figures)
