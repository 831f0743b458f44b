"""How reward models want their images, on tensors, so that ReFL's gradient flows: (B, 3, H, W) in [0, 1] -> a square.

1. Their libraries resize 8-bit PIL images; here it is the same antialiased bicubic on float32, without a rounding in
   between. Nothing is clamped afterwards: a bicubic overshoots by a few hundredths, as HPSv2's own tensors do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def resize_and_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """The shorter side to `size`, then the middle square: CLIP's own (Radford et al. 2021)."""
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, size * height // short, size * width // short)
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """The longer side to `size`, black around it: HPSv2's (Wu et al. 2023), whatever open_clip does."""
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    images, down, right = resize(images, height, width), size - height, size - width
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def resize_to_square(images: torch.Tensor, size: int) -> torch.Tensor:
    """Both sides to `size`, whatever the proportions: DFN's (Fang et al. 2023)."""
    return resize(images, size, size)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """By the mean and standard deviation of CLIP's training images."""
    mean, std = (images.new_tensor(each).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std
