"""What colour an object has, by GenEval's zero-shot classifier: CLIP ViT-L/14 on its crop, with the rest greyed out.

1. CLIP is in float32 and the crop is resized without rounding to 8 bits; GenEval's has CLIP under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dmdr.metrics.geneval_rules import COLOURS, Detection
from dmdr.rewards.open_clip import build_clip
from dmdr.rewards.preprocess import normalize, resize_and_crop

GREY = 0x99 / 255
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class ColourClassifier:
    """From a file of weights, or a folder in open_clip's layout; raises as `load_open_clip` does."""

    def __init__(self, path: Path, device: str) -> None:
        self.model, self.tokenizer, self.size = build_clip("clip-vit-l-14", "ViT-L-14-quickgelu", path, device)
        self.device = device
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
        """image (3, H, W) in [0, 1] -> the colour of each object of a class."""
        crops = [crop(image.cpu(), each)[None] for each in objects]
        pixels = torch.cat([normalize(resize_and_crop(each.to(self.device), self.size)) for each in crops])
        features = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        return [COLOURS[index] for index in (features @ self.texts(name).T).argmax(-1).tolist()]

    def texts(self, name: str) -> torch.Tensor:
        """(10, D): of each colour, the mean of its templates' features, of length 1."""
        if name not in self._texts:
            lines = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
            features = F.normalize(self.model.encode_text(self.tokenizer(lines).to(self.device)).float(), dim=-1)
            self._texts[name] = F.normalize(features.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)
        return self._texts[name]


def crop(image: torch.Tensor, seen: Detection) -> torch.Tensor:
    """(3, H, W) -> (3, h, w): the object's box, at least a pixel, with GREY outside of its mask."""
    if seen.mask is not None:
        image = torch.where(torch.from_numpy(seen.mask), image, torch.full_like(image, GREY))
    left, top = (int(np.floor(each)) for each in seen.box[:2])
    right, bottom = (int(np.ceil(each)) for each in seen.box[2:])
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
