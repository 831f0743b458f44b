"""Stands for a reward whose cost nobody knows, on the device "meta": a user's code, a service, a verifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmdr.config.prompt_record import PromptRecord


class Uncounted:
    """Gives scores without numbers, at no cost. The gradient reaches the images, as ReFL's plan needs it."""

    differentiable = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        """images (B, 3, H, W) -> (B,)."""
        return images.mean(dim=(1, 2, 3))
