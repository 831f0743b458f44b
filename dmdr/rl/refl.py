"""ReFL: reward feedback learning (Xu et al. 2023, ImageReward), with the DMD term in the place of its pretraining loss.

1. A few-step student predicts x0 at each of its N steps, so the gradient reaches any of them directly (DMDR, 4.3);
   no step near the end is singled out.
2. Several rewards are summed with their configured shares before the loss.
"""

from __future__ import annotations

import torch

from dmdr import losses, rewards
from dmdr.backbones import Backbone
from dmdr.config import ReFL as ReFLConfig
from dmdr.errors import ConfigError


class ReFL:
    """The RL loss of a batch: -mean reward of the decoded x0.

    Raises:
        ConfigError: a reward is unknown or has no gradient.
    """

    def __init__(self, config: ReFLConfig, backbone: Backbone) -> None:
        self.backbone, self.shares = backbone, config.rewards
        self.rewards = {name: rewards.load(name, device=str(backbone.network.device)) for name in config.rewards}
        flat = [name for name, reward in self.rewards.items() if not reward.differentiable]
        if flat:
            raise ConfigError(f"joint.rl.rewards: ReFL needs a gradient and {', '.join(flat)} has none; use another")

    def __call__(self, x0: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = self.backbone.decode(x0)
        scores_B = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        total_B = sum(self.shares[name] * score_B for name, score_B in scores_B.items())
        return losses.refl(total_B), {f"reward/{name}": each.detach().mean() for name, each in scores_B.items()}
