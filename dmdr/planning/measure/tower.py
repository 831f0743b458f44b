"""Rewards of random weights, of the size of those that DMDR trains on: they cost the same, and need no files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dmdr.config.prompt_record import PromptRecord
from dmdr.rewards.dual_encoder import DualEncoder
from dmdr.rewards.preprocess import normalize, resize_to_square


class VisionTower(nn.Module):
    """A ViT-H-14: (B, 3, 224, 224) -> features (B, 1024)."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            projection_dim=1024,
            num_hidden_layers=32,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        )
        self.tower = CLIPVisionModelWithProjection(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tower(pixel_values=images).image_embeds
        return features


class Tower:
    """The image tower of DFN-CLIP and HPSv2.1, a ViT-H-14, and features of prompts that depend on nothing."""

    differentiable = True
    version = "1"
    range = (-100.0, 100.0)
    size = 224

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.network = self.build().requires_grad_(False).eval()
        self.encoder = DualEncoder("tower", self._encode_images, self._encode_prompts, 100.0)
        with torch.no_grad():
            width = self._encode_images(torch.zeros(1, 3, self.size, self.size, device=device)).shape[1]
        self.text = torch.randn(1, width, generator=torch.Generator().manual_seed(1)).to(device)

    def build(self) -> nn.Module:
        return VisionTower()

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(normalize(resize_to_square(images, self.size)))
        return features

    def _encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        return self.text.expand(len(prompts), -1)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        return self.encoder(images, prompts)


class SmallTower(Tower):
    """One for a try on a CPU."""

    size = 16

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 8))
