"""A reward that another process computes, as any other: images go out as 8-bit PNG, scores come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmdr.config.own_rewards import OwnReward
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import NonFinite
from dmdr.rewards.client import RewardClient
from dmdr.rewards.own import check_scores
from dmdr.rewards.png import encode_image
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.wire import ScoreRequest


class ServiceReward:
    """The reward of a service. Its scores have no gradient.

    Raises:
        RewardUnavailable, ConfigError, DataError: as RewardClient, when it is built and whenever it is called.
        NonFinite: an image or a score is not a number.
    """

    differentiable = False

    def __init__(self, name: str, reward: OwnReward, sources: RewardSources) -> None:
        self.name, self.batch = name, reward.batch
        self.client = RewardClient(name, reward, sources)
        self.about = self.client.fetch_about()

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> scores (B,) float32, asked for in batches, one after another."""
        if not images.isfinite().all():
            raise NonFinite(f"an image for the reward {self.name} is not a number; lower the learning rates")
        known = [dict(each) for each in metadata] or [{"prompt": prompt} for prompt in prompts]
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        scores: list[float] = []
        for start in range(0, len(pixels), self.batch):
            part = slice(start, start + self.batch)
            request = ScoreRequest.model_validate(
                {
                    "images": [encode_image(image) for image in pixels[part]],
                    "prompts": prompts[part],
                    "metadata": known[part],
                }
            )
            scores += self.client.fetch_scores(request, self.about)
        found = torch.tensor(scores, dtype=torch.float32, device=images.device)
        return check_scores(found, len(images), f"the reward {self.name} at {self.client.url}")
