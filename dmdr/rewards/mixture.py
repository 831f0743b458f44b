"""The weighted sum of the rewards that a run trains on. They are checked before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.config.rl import RL
from dmdr.errors import ConfigError
from dmdr.rewards.load import load_reward
from dmdr.rewards.protocol import Reward
from dmdr.rewards.wording import Wording

PROBES = ["a red circle", "two blue squares", ""]  # prompts of the plain images that every reward has to score


class Mixture:
    """The sum of share times reward, each with its scale and its words.

    differentiable: require a gradient of every reward. positive: require rewards and shares above 0, for their log.
    weights: the config's `weights`; a set of weights that is not in it lies at its pinned address. seed: of the words
    that a preference draws.

    Raises:
        ConfigError: a reward is unknown, does not meet these requirements, or does not give each plain image one finite
            number.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    def __init__(
        self,
        config: RL,
        backbone: Backbone,
        *,
        differentiable: bool,
        positive: bool = False,
        weights: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.shares, self.scales, self.backbone = config.rewards, config.scales, backbone
        shares, device = self.shares, backbone.network.device
        self.wordings = {
            name: Wording(name, seed, config.prefixes.get(name, ""), config.preferences.get(name)) for name in shares
        }
        self.rewards = {name: load_reward(name, str(device), weights) for name in shares}
        if differentiable:
            refuse_without_gradient(self.rewards)
        if device.type == "meta":  # no numbers to check
            return
        with torch.no_grad():
            images = backbone.decode(torch.zeros(len(PROBES), *backbone.latent_shape, device=device))
        for name, scores in self(images, PROBES, update=0).items():
            check_scores(name, scores, share=shares[name], positive=positive)

    def __call__(self, images: torch.Tensor, prompts: list[str], *, update: int) -> dict[str, torch.Tensor]:
        """images (B, 3, H, W) in [0, 1] -> the scores (B,) of each reward, with its words of this update."""
        return {
            name: self.wordings[name].score(reward, images, prompts, update) for name, reward in self.rewards.items()
        }

    def scale(self, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The scores of all rewards, each times its scale."""
        return {name: self.scales[name] * each if name in self.scales else each for name, each in scores.items()}

    def mix(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores (M,) of all rewards -> their sum (M,), each times its scale and its share."""
        first, *others = [self.shares[name] * each for name, each in self.scale(scores).items()]
        return sum(others, start=first)

    @torch.no_grad()
    def score_samples(
        self, x0: torch.Tensor, prompts: list[str], at_once: int, *, update: int = 0
    ) -> dict[str, torch.Tensor]:
        """x0 (M, C, H, W) -> the scores (M,) of each reward; `at_once` images are decoded and scored at a time."""
        parts = [
            self(self.backbone.decode(x0[start : start + at_once]), prompts[start : start + at_once], update=update)
            for start in range(0, len(x0), at_once)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in self.rewards}


def refuse_without_gradient(rewards: Mapping[str, Reward]) -> None:
    """
    Raises:
        ConfigError: one of the rewards has no gradient, which ReFL follows.
    """
    without_gradient = [name for name, reward in rewards.items() if not reward.differentiable]
    if without_gradient:
        raise ConfigError(
            f"joint.rl.rewards: ReFL needs a gradient, but {', '.join(without_gradient)} has none; use another "
            "reward, or algorithm: grpo or dpo"
        )


def check_scores(name: str, scores: torch.Tensor, *, share: float, positive: bool) -> None:
    """Refuse a reward whose scores of the PROBES are unusable.

    Raises:
        ConfigError: the scores are not one finite number each or, where `positive`, do not have a log.
    """
    if scores.shape != (len(PROBES),):
        raise ConfigError(
            f"joint.rl.rewards: {name} gives {tuple(scores.shape)} for {len(PROBES)} images, not one number each; use "
            "another reward"
        )
    if not scores.isfinite().all():
        raise ConfigError(
            f"joint.rl.rewards: {name} gives {scores.tolist()} for three plain images; use another reward"
        )
    if positive and (share <= 0 or not (scores > 0).all()):
        raise ConfigError(
            f"joint.rl.map: log needs rewards and shares above 0, and {name}, share {share:g}, gives "
            f"{scores.tolist()} for three plain images; use map: linear"
        )
