"""What a model draws in evaluation, and the type of the function that draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr.backbones.protocol import Conditioning


@dataclass(frozen=True)
class Batch:
    """B images to draw.

    noises: (N, B, C, H, W), the start first. generators: of each image, for a pipeline that draws its own noise.
    """

    prompts: list[str]
    c: Conditioning
    noises: torch.Tensor
    generators: list[torch.Generator]


Sampler = Callable[[Batch], torch.Tensor]  # -> images (B, 3, H, W) in [0, 1]
