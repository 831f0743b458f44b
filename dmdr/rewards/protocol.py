"""The protocol of a reward: images, their prompts and what is known of each prompt -> one score each.

Rewards that come with DMDR, a user's own in a file or a package, and those of another process all keep it. What names a
reward in a result (name, version, digest) is found without loading it: `identity.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from dmdr.config.prompt_record import PromptRecord


class Reward(Protocol):
    """Scores images under their prompts; higher is better."""

    name: str
    differentiable: bool  # whether the gradient of the score reaches the images

    def __call__(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = (), /
    ) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> scores (B,) float32.

        prompts: what the reward reads, words before a prompt included. metadata: what the source of each of the B
        prompts says about it, such as GenEval's `include`, with the prompt as it was written; empty where nobody knows.
        Each score depends on its own image and prompt alone.
        """
