"""What a reward reads in the place of a prompt: a prefix before it, or two words under which it compares an image.

1. The semantic relative preference is the reward that the authors' code for text to image calls SRPO: of a reward that
   compares features of unit length, image . ((1 + k) text(P) - text(N)), where P and N are the prompt behind a positive
   and a negative word. Here any reward that reads prompts can wear it, as (1 + k) reward(P) - reward(N): the same.
2. The words are drawn once an update, from its number and the seed, so that a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import Preference
from dmdr.noise import generator_for
from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.protocol import Reward


@dataclass(frozen=True)
class Wording:
    """What stands before the prompts of the reward `name`: a prefix, or the words of a preference."""

    name: str
    seed: int
    prefix: str = ""
    preference: Preference | None = None

    def score(self, reward: Reward, images: torch.Tensor, records: Sequence[PromptRecord], update: int) -> torch.Tensor:
        """The scores (B,) of images (B, 3, H, W) in [0, 1] under the prompts of B records, with an update's words."""
        prompts = [record["prompt"] for record in records]
        if self.preference is None:
            return reward(images, [self.prefix + prompt for prompt in prompts], records)
        positive, negative = self.draw_words(self.preference, update)
        wanted, unwanted = ([f"{word}. {prompt}" for prompt in prompts] for word in (positive, negative))
        factor = 1 + self.preference.k
        if isinstance(reward, DualEncoder):  # which needs to see the images only once
            features = factor * reward.embed_captions(wanted) - reward.embed_captions(unwanted)
            return reward.scale * (reward.embed_images(images) * features).sum(-1)
        return factor * reward(images, wanted, records) - reward(images, unwanted, records)

    def draw_words(self, preference: Preference, update: int) -> tuple[str, str]:
        """The positive and the negative word of an update."""
        generator = generator_for(self.seed, "preference", self.name, update)
        lists = (preference.positive, preference.negative)
        positive, negative = (words[int(torch.randint(len(words), (), generator=generator))] for words in lists)
        return positive, negative
