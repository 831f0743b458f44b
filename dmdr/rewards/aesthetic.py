"""LAION's aesthetic score, version 2 (Schuhmann et al. 2022): an MLP on CLIP ViT-L/14's image features, 1 to 10.

1. The MLP has no activations (its dropouts are off), so it is one affine map: w and b are multiplied out in float64.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from dmdr.errors import DataError
from dmdr.rewards.checkpoint import read_linear, read_tensors
from dmdr.rewards.transformers_clip import TransformersCLIP, read_sizes

PUBLISHED = read_sizes(text=(768, 12, 12), vision=(1024, 24, 16))  # CLIP ViT-L/14


class Aesthetic:
    """b + w . e of the normalised image features e; the prompt has no part in it.

    Raises:
        DataError: the weights are damaged, or are another model's.
    """

    name, differentiable = "aesthetic", True

    def __init__(self, head: Path | None, clip: TransformersCLIP, device: str) -> None:
        self.clip = clip
        width = clip.model.config.projection_dim
        weight, bias = (
            read_linear(read_tensors(head), "layers.", head)
            if head is not None
            else (torch.zeros(width), torch.zeros(()))
        )
        if len(weight) != width:
            raise DataError(
                f"weights {head} take {len(weight)} features, the CLIP gives {width}; give the one they fit"
            )
        self.weight, self.bias = weight.float().to(device), bias.float().to(device)

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        half = images.is_cuda and torch.is_grad_enabled()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            features = self.clip.encode_images(images)
        return F.normalize(features.float(), dim=-1) @ self.weight + self.bias


def load_aesthetic(head: Path | None, clip: Path | None, device: str) -> Aesthetic:
    """head: the MLP's file; clip: a folder of transformers; None: without weights, for the device "meta"."""
    return Aesthetic(head, TransformersCLIP(clip, device, PUBLISHED), device)
