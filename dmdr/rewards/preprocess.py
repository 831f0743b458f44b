"""Preprocess images for reward models, on tensors, so that ReFL's gradient flows: (B, 3, H, W) in [0, 1] -> a square.

1. The models' own libraries resize 8-bit PIL images. Here float32 tensors are resized by the same antialiased bicubic
   filter, without rounding. The result is not clamped: the filter overshoots by a few hundredths, also in HPSv2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, height, width)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def resize_and_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the shorter side to `size` and keep the middle square: CLIP's own way (Radford et al. 2021)."""
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = resize(images, size * height // short, size * width // short)
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return resized[..., top : top + size, left : left + size]


def resize_and_pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the longer side to `size` and add black around it: HPSv2's way (Wu et al. 2023), not open_clip's."""
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    rows, columns = size - height, size - width  # of black, on both sides together
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(resize(images, height, width), padding)


def resize_to_square(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize both sides to `size`, whatever the proportions: DFN's way (Fang et al. 2023)."""
    return resize(images, size, size)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of CLIP's training images, and divide by their standard deviation."""
    mean, std = _find_moments(images.device, images.dtype)
    return (images - mean) / std


@lru_cache(maxsize=8)
def _find_moments(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (3, 1, 1), copied to a device once."""
    mean, std = (torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return mean, std
