"""A reward that compares the features of an image and its prompt, from two encoders, and caches those of prompts.

1. The features of a prompt are computed once. Those of the last KEPT_PROMPTS prompts stay on the device: 4 KiB each at
   width 1024.
2. On a GPU the image encoder runs in bfloat16 if a gradient is computed, because training does not report these scores.
   Scores that are reported are float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from dmdr.config.prompt_record import PromptRecord

KEPT_PROMPTS = 65_536


class DualEncoder:
    """`scale` times the cosine between the features of image and prompt.

    Args:
        encode_images: (B, 3, H, W) in [0, 1] -> (B, D), differentiable.
        encode_prompts: B prompts -> (B, D).
    """

    differentiable = True

    def __init__(
        self,
        name: str,
        encode_images: Callable[[torch.Tensor], torch.Tensor],
        encode_prompts: Callable[[list[str]], torch.Tensor],
        scale: float,
    ) -> None:
        self.name, self.encode_images, self.encode_prompts, self.scale = name, encode_images, encode_prompts, scale
        self.features: OrderedDict[str, torch.Tensor] = OrderedDict()  # prompt -> (D,), the latest used last

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        return self.scale * (self.embed_images(images) * self.embed_captions(prompts)).sum(-1)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32, of length 1."""
        half = images.is_cuda and torch.is_grad_enabled()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            features = self.encode_images(images)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def embed_captions(self, prompts: list[str]) -> torch.Tensor:
        """B prompts -> (B, D) float32, of length 1."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.features]
        if new:
            self.features.update(zip(new, F.normalize(self.encode_prompts(new).float(), dim=-1), strict=True))
        for prompt in prompts:
            self.features.move_to_end(prompt)
        features = torch.stack([self.features[prompt] for prompt in prompts])
        while len(self.features) > KEPT_PROMPTS:
            self.features.popitem(last=False)
        return features
