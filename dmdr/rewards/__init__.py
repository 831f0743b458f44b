"""Rewards behind one small protocol, one file a reward. What a run trains on is marked wherever it is reported."""

from __future__ import annotations

from typing import Protocol

import torch

from dmdr.errors import ConfigError

LAB = ("lab-conv", "lab-mixer")
FASHION = ("fashion-conv", "fashion-mixer")


class Reward(Protocol):
    """A score of images under their prompts; higher is better."""

    name: str
    differentiable: bool

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B,) float32."""


def load(name: str, device: str = "cpu") -> Reward:
    """The reward of that name, frozen.

    Raises:
        ConfigError: there is none.
    """
    from dmdr.rewards import lab

    if name not in (*LAB, *FASHION):
        raise ConfigError(f"unknown reward {name!r}; DMDR has {', '.join((*LAB, *FASHION))}")
    return lab.load(name, device)
