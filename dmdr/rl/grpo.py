"""GRPO: group relative policy optimization (Shao et al. 2024) on the renoising steps of the few-step sampler.

1. Flow-GRPO (Liu et al. 2025) turns an ODE into an SDE to have a policy; the few-step sampler is a policy already.
2. As in the code of Flow-GRPO, log likelihoods are averaged over the elements of a latent before the ratio is taken. A
   real model has 262,144 of them; the ratio of the likelihoods themselves is 0 or infinite after one update.
3. The rollout comes from the very student that is updated. So in the first of `inner_updates` the ratio is 1; only in
   later ones it can be clipped.
4. Distribution matching takes the place of the KL to the reference (DMDR, 3.2). The KL remains for RL alone.

P prompts, G images of each, M = P G trajectories, B states of which A were followed by an action.
"""

from __future__ import annotations

import torch

from dmdr import losses
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import GRPO as GRPOConfig
from dmdr.rewards.sources import RewardSources
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective, action_share, find_actions, reward_groups
from dmdr.rollout import States
from dmdr.shared_base import SharedBase
from dmdr.update import Batch


class GRPO:
    """The RL loss of a batch: the clipped surrogate over the actions of its states.

    weights: where the rewards of the config lie. seed: of the words
    that a preference draws. eta: of rollouts.

    Raises:
        ConfigError: a reward is unknown or broken.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    oversampling, block = 1.0, 1

    def __init__(
        self,
        config: GRPOConfig,
        base: SharedBase,
        weights: RewardSources | None = None,
        *,
        seed: int = 0,
        eta: float = 1.0,
    ) -> None:
        self.base, self.eta, self.kl, self.clip_range = base, eta, config.kl, config.clip_range
        self.group_size, self.inner_updates = config.group_size, config.inner_updates
        self.reward = Mixture(config, base.backbone, differentiable=False, weights=weights, seed=seed)

    def build_objective(self, states: States, prompts: list[PromptRecord], *, update: int = 0) -> Objective:
        rewards_PG, figures = reward_groups(self.reward, states, prompts, self.group_size, update=update)
        advantages_M = losses.advantages(rewards_PG).flatten()
        path = self.base.backbone.path

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            actions = find_actions(states, batch, path, self.eta)
            acts = actions.mask
            log_ratio_A = (actions.log_prob(x0[acts]) - actions.log_prob(batch.x0[acts])) / x0[0].numel()
            total = losses.grpo(log_ratio_A, advantages_M[batch.trajectory[acts]], self.clip_range)
            clipped_A = ((log_ratio_A.detach().exp() - 1).abs() > self.clip_range).float()
            share = action_share(acts, batch)
            part_figures = {"clipped": clipped_A.sum() / max(len(clipped_A), 1) * share}
            if self.kl:
                reference = self.base.reference(batch.x_t, batch.t, batch.c)
                ratio = actions.step.slope() / actions.step.deviation()
                regulariser = losses.gaussian_kl(x0[acts], reference[acts], ratio)
                part_figures["loss_reference"] = regulariser.detach() * share
                total = total + self.kl * regulariser
            return total * share, part_figures

        return Objective(loss, torch.arange(len(prompts))[:, None], figures)
