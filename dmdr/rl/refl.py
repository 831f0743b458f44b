"""ReFL: reward feedback learning (Xu et al. 2023, ImageReward), with the DMD term in the place of its pretraining loss.

1. A few-step student predicts x0 at each of its N steps, so the gradient reaches any of them directly (DMDR, 4.3);
   no step near the end is singled out.
2. Several rewards are summed with their configured shares, then mapped (ReFL's phi), before the loss.
3. Its usual regulariser, for RL without distribution matching, is the pretraining loss. There are no images to pretrain
   on here: the student of the cold start, which is what the paper's P_fake_ref is, says what to predict at each state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmdr import losses
from dmdr.config.run import ReFL as ReFLConfig
from dmdr.rewards.mixture import Mixture
from dmdr.rl import decoders
from dmdr.rl.objective import Figures, Objective
from dmdr.rollout import States
from dmdr.shared_base import SharedBase
from dmdr.update import Batch


class ReFL:
    """The RL loss of a batch: minus the mean mapped reward of the decoded x0.

    Raises:
        ConfigError: a reward is unknown, has no gradient or, for its log, is not above 0, or is broken.
        DataError, InputMissing: the tiny decoder is missing, or does not fit the teacher.
    """

    group_size, oversampling, inner_updates, block = 1, 1.0, 1, 1

    def __init__(self, config: ReFLConfig, base: SharedBase, weights: Mapping[str, str] | None = None) -> None:
        self.base, self.pretraining = base, config.pretraining
        self.reward = Mixture(
            config.rewards, base.backbone, differentiable=True, positive=config.map == "log", weights=weights
        )
        self.decode = decoders.load_decoder(config, base.backbone)
        self.loss = {"linear": losses.refl, "log": losses.refl_log}[config.map]

    def build_objective(self, states: States, prompts: list[str]) -> Objective:
        def loss(x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
            images = self.decode(x0)
            scores_B = self.reward(images, [prompts[i] for i in batch.trajectory.tolist()])
            total, figures = self.loss(self.reward.mix(scores_B)), score_moments(scores_B)
            if self.pretraining:
                regulariser = losses.pretraining(x0, self.base.reference(batch.x_t, batch.t, batch.c))
                total, figures = total + self.pretraining * regulariser, {**figures, "loss_reference": regulariser}
            return total * batch.share, {name: each.detach() * batch.share for name, each in figures.items()}

        return Objective(loss, torch.arange(states.x0.shape[1])[:, None])


def score_moments(scores_B: dict[str, torch.Tensor]) -> Figures:
    """Of each reward's scores, in float64: means, and mean squares, which parts of a batch can add up."""
    exact = {name: each.detach().double() for name, each in scores_B.items()}
    squares = {f"reward_square/{name}": each.square().mean() for name, each in exact.items()}
    return {f"reward/{name}": each.mean() for name, each in exact.items()} | squares
