"""A reward model as a metric: the score that training may have seen, reported under the reward's own name."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.rewards.protocol import Reward


class RewardMetric:
    """Judges images of every prompt."""

    writes = None

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.figures = (reward.name,)

    def judges(self, record: PromptRecord) -> bool:
        return True

    def check_prompts(self, records: list[PromptRecord]) -> None:
        """Every prompt can be judged."""

    def __call__(self, images: torch.Tensor, records: list[PromptRecord]) -> tuple[dict[str, np.ndarray], list[None]]:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], and no lines."""
        with torch.no_grad():
            scores = self.reward(images.clamp(0, 1), [record["prompt"] for record in records], records)
        return {self.reward.name: scores.double().cpu().numpy()}, [None] * len(records)
