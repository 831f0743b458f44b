"""DPO: direct preference optimization (Rafailov et al. 2023) on the student's own samples.

1. The winner and the loser of a group are its best and its worst image by reward; no pairs are collected beforehand.
2. Preferences are over actions (D3PO, Yang et al. 2024): each renoising step compares the likelihood ratios, student to
   reference, of the winner's and the loser's action. They are exact here. Diffusion-DPO (Wallace et al. 2024) bounds
   them by denoising errors, because the ratio of a multi-step teacher is out of reach.
3. Log likelihoods are averaged over the elements of a latent, as in grpo.py; `beta` has that unit.
4. The reference is the student of the cold start. It is DPO's own regulariser, with distribution matching or without.

P pairs of one step each, B states.
"""

from __future__ import annotations

import torch

from dmdr import losses
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import DPO as DPOConfig
from dmdr.rewards.sources import RewardSources
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective, action_share, find_actions, reward_groups
from dmdr.rollout import States
from dmdr.shared_base import SharedBase
from dmdr.update import Batch


class DPO:
    """The RL loss of a batch of pairs: states 2i and 2i + 1 belong to one step, the winner's state first.

    weights: where the rewards of the config lie. seed: of the words
    that a preference draws. eta: of rollouts.

    Raises:
        ConfigError: a reward is unknown or broken.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    inner_updates, block = 1, 2

    def __init__(
        self,
        config: DPOConfig,
        base: SharedBase,
        weights: RewardSources | None = None,
        *,
        seed: int = 0,
        eta: float = 1.0,
    ) -> None:
        self.base, self.eta, self.beta, self.group_size = base, eta, config.beta, config.group_size
        self.oversampling = config.group_size / 2
        self.reward = Mixture(config, base.backbone, differentiable=False, weights=weights, seed=seed)

    def build_objective(self, states: States, prompts: list[PromptRecord], *, update: int = 0) -> Objective:
        rewards_PG, figures = reward_groups(self.reward, states, prompts, self.group_size, update=update)
        first = torch.arange(0, len(prompts), self.group_size)
        winner, loser = rewards_PG.argmax(1).cpu(), rewards_PG.argmin(1).cpu()
        ranked = rewards_PG.amax(1) > rewards_PG.amin(1)  # a group of equal rewards has no preference
        path = self.base.backbone.path

        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            actions = find_actions(states, batch, path, self.eta)
            acts = actions.mask
            reference = self.base.reference(batch.x_t, batch.t, batch.c)[acts]
            log_ratio = actions.log_prob(x0[acts]) - actions.log_prob(reference)
            gain_w_P, gain_l_P = (log_ratio / x0[0].numel()).view(-1, 2).unbind(1)
            group = batch.trajectory[acts][::2] // self.group_size
            part = losses.dpo(gain_w_P, gain_l_P, self.beta, ranked[group]) * action_share(acts, batch)
            prefers_P = (gain_w_P.detach() > gain_l_P.detach()).float()
            return part, {"prefers_winner": prefers_P.sum() / max(len(prefers_P), 1) * action_share(acts, batch)}

        return Objective(loss, torch.stack([first + winner, first + loser], dim=1), figures)
