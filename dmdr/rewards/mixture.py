"""Several rewards as one, each with its share; what a run trains on, checked before its first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmdr import rewards
from dmdr.backbones import Backbone
from dmdr.errors import ConfigError

PROBES = ["a red circle", "two blue squares", ""]


class Mixture:
    """sum of share times reward. `differentiable` demands a gradient of every reward, `positive` that it has a log.

    weights: where those of the rewards lie, if not at their pinned addresses.

    Raises:
        ConfigError: a reward is unknown, lacks what is demanded, or answers a probe with another shape or no number.
        InputMissing, DataError: its weights are missing, or damaged.
    """

    def __init__(
        self,
        shares: dict[str, float],
        backbone: Backbone,
        *,
        differentiable: bool,
        positive: bool = False,
        weights: Mapping[str, str] | None = None,
    ) -> None:
        self.shares, self.backbone = shares, backbone
        self.rewards = {name: rewards.load(name, str(backbone.network.device), weights) for name in shares}
        flat = [name for name, reward in self.rewards.items() if not reward.differentiable]
        if differentiable and flat:
            raise ConfigError(
                f"joint.rl.rewards: ReFL needs a gradient and {', '.join(flat)} has none; use another reward, or "
                "algorithm: grpo or dpo"
            )
        with torch.no_grad():
            images = backbone.decode(torch.zeros(len(PROBES), *backbone.latent_shape, device=backbone.network.device))
        for name, reward in self.rewards.items():
            found = reward(images, PROBES)
            if found.shape != (len(PROBES),):
                shape = tuple(found.shape)
                raise ConfigError(
                    f"joint.rl.rewards: {name} gives {shape} for {len(PROBES)} images, not one number each"
                )
            if not found.isfinite().all():
                raise ConfigError(
                    f"joint.rl.rewards: {name} gives {found.tolist()} for three plain images; use another"
                )
            if positive and (shares[name] <= 0 or not (found > 0).all()):
                raise ConfigError(
                    f"joint.rl.map: log needs rewards and shares above 0, and {name}, share {shares[name]:g}, gives "
                    f"{found.tolist()} for three plain images; use map: linear"
                )

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """images (B, 3, H, W) in [0, 1] -> (B,); mean and standard deviation of each reward, to log."""
        scores_B = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        figures = {f"reward/{name}": each.detach().mean() for name, each in scores_B.items()}
        figures |= {f"reward_std/{name}": each.detach().std(correction=0) for name, each in scores_B.items()}
        return sum(self.shares[name] * each for name, each in scores_B.items()), figures

    @torch.no_grad()
    def of_samples(
        self, x0: torch.Tensor, prompts: list[str], group_size: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x0 (P G, C, H, W) -> (P, G), decoded a group at a time, and the same figures."""
        parts = x0.split(group_size)
        images = torch.cat([self.backbone.decode(part) for part in parts])
        rewards_M, figures = self(images, prompts)
        return rewards_M.view(-1, group_size), figures
