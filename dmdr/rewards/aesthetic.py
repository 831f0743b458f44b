"""LAION's aesthetic score, version 2 (Schuhmann et al. 2022): an MLP on CLIP ViT-L/14's image features, 1 to 10.

1. The MLP has no activations and its dropouts are off, so it is one affine map. Its layers are multiplied into one w
   and one b, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError
from dmdr.rewards.checkpoint import read_linear, read_tensors
from dmdr.rewards.transformers_clip import CLIPSizes, EncoderSizes, TransformersCLIP

VIT_L_14 = CLIPSizes(text=EncoderSizes(768, 12, 12), vision=EncoderSizes(1024, 24, 16))


class Aesthetic:
    """b + w . e, where e are the image's features, normalised to length 1. The prompt does not matter.

    Raises:
        DataError: the weights are damaged, or belong to another model.
    """

    name, differentiable = "aesthetic", True

    def __init__(self, head: Path | None, clip: TransformersCLIP, device: str) -> None:
        self.clip = clip
        if head is None:
            weight, bias = torch.zeros(clip.width), torch.zeros(())
        else:
            weight, bias = read_linear(read_tensors(head), "layers.", head)
        if len(weight) != clip.width:
            raise DataError(
                f"weights {head} take {len(weight)} features, but the CLIP gives {clip.width}; give the weights that "
                "were trained on this CLIP"
            )
        self.weight, self.bias = weight.float().to(device), bias.float().to(device)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        half = images.is_cuda and torch.is_grad_enabled()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            features = self.clip.encode_images(images)
        return F.normalize(features.float(), dim=-1) @ self.weight + self.bias


def load_aesthetic(head: Path | None, clip: Path | None, device: str) -> Aesthetic:
    """head: the file of the MLP; clip: a folder that transformers saved. Both are None on the device "meta"."""
    return Aesthetic(head, TransformersCLIP(clip, device, VIT_L_14), device)
