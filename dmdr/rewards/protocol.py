"""The protocol of a reward, which scores images under their prompts."""

from __future__ import annotations

from typing import Protocol

import torch


class Reward(Protocol):
    """Scores images under their prompts; higher is better."""

    name: str
    differentiable: bool  # whether the gradient of the score reaches the images

    def __call__(self, images: torch.Tensor, prompts: list[str], /) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> scores (B,) float32."""
