"""Several rewards as one, each with its share; what a run trains on, checked before its first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.errors import ConfigError
from dmdr.rewards.load import load_reward

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
        self.rewards = {name: load_reward(name, str(backbone.network.device), weights) for name in shares}
        flat = [name for name, reward in self.rewards.items() if not reward.differentiable]
        if differentiable and flat:
            raise ConfigError(
                f"joint.rl.rewards: ReFL needs a gradient and {', '.join(flat)} has none; use another reward, or "
                "algorithm: grpo or dpo"
            )
        if backbone.network.device.type == "meta":  # no numbers to probe
            return
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

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """images (B, 3, H, W) in [0, 1] -> (B,) of each reward."""
        return {name: reward(images, prompts) for name, reward in self.rewards.items()}

    def mixed(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores (M,) of all rewards, each with its share: (M,)."""
        return sum(self.shares[name] * each for name, each in scores.items())

    @torch.no_grad()
    def of_samples(self, x0: torch.Tensor, prompts: list[str], at_once: int) -> dict[str, torch.Tensor]:
        """x0 (M, C, H, W) -> (M,) of each reward, `at_once` decoded and scored at a time."""
        found = [
            self(self.backbone.decode(x0[start : start + at_once]), prompts[start : start + at_once])
            for start in range(0, len(x0), at_once)
        ]
        return {name: torch.cat([part[name] for part in found]) for name in self.rewards}
