"""Rewards behind one small protocol, one file a reward. What a run trains on is marked wherever it is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from dmdr.config import reward_weights
from dmdr.config.reward_weights import FASHION, LAB
from dmdr.errors import ConfigError
from dmdr.rewards import weights


class Reward(Protocol):
    """A score of images under their prompts; higher is better."""

    name: str
    differentiable: bool

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B,) float32."""


def load_reward(name: str, device: str = "cpu", addresses: Mapping[str, str] | None = None) -> Reward:
    """The reward of that name, frozen; on the device "meta" without its weights, which need not be there.

    addresses: the config's `weights`, where they are not the pinned ones.

    Raises:
        ConfigError: there is none.
        InputMissing: its weights are not where they should be.
        DataError: its weights are damaged, or another model's.
    """
    from dmdr.rewards import aesthetic, imagereward, lab, open_clip, pickscore

    if name in (*LAB, *FASHION):
        return lab.load_lab_reward(name, device)
    loaders = {
        **open_clip.LOADERS,
        "pickscore": pickscore.load_pickscore,
        "aesthetic": aesthetic.load_aesthetic,
        "imagereward": imagereward.load_imagereward,
    }
    if name not in loaders:
        raise ConfigError(f"unknown reward {name!r}; DMDR has {', '.join(reward_weights.OF_REWARD)}")
    if device == "meta":
        return loaders[name](*(None for _ in reward_weights.OF_REWARD[name]), device)
    return loaders[name](
        *(weights.find_weights(each, addresses or {}) for each in reward_weights.OF_REWARD[name]), device
    )
