"""Name the colour of an object, by GenEval's zero-shot classifier: CLIP ViT-L/14 on its crop, the rest greyed out.

1. CLIP runs in float32 and the crop is resized without rounding to 8 bits; GenEval runs CLIP under autocast.
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
    """CLIP ViT-L/14, from a file of weights or a folder of open_clip; errors as for `load_open_clip`."""

    def __init__(self, path: Path, device: str) -> None:
        self.clip = build_clip("clip-vit-l-14", "ViT-L-14-quickgelu", path, device)
        self.device = device
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
        """image (3, H, W) in [0, 1], objects of the class `name` -> the colour of each."""
        crops = [crop(image.cpu(), each)[None] for each in objects]
        pixels = torch.cat([normalize(resize_and_crop(each.to(self.device), self.clip.size)) for each in crops])
        features = F.normalize(self.clip.model.encode_image(pixels).float(), dim=-1)
        return [COLOURS[index] for index in (features @ self.embed_colours(name).T).argmax(-1).tolist()]

    def embed_colours(self, name: str) -> torch.Tensor:
        """Text features (10, D) of the colours of a class, of length 1: each the mean over the templates."""
        if name not in self._texts:
            captions = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
            features = F.normalize(
                self.clip.model.encode_text(self.clip.tokenize(captions).to(self.device)).float(), dim=-1
            )
            self._texts[name] = F.normalize(features.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)
        return self._texts[name]


def crop(image: torch.Tensor, detection: Detection) -> torch.Tensor:
    """(3, H, W) -> (3, h, w): the object's box, of one pixel at least, with GREY outside of its mask."""
    shown = image
    if detection.mask is not None:
        shown = torch.where(torch.from_numpy(detection.mask), image, torch.full_like(image, GREY))
    left, top = (int(np.floor(each)) for each in detection.box[:2])
    right, bottom = (int(np.ceil(each)) for each in detection.box[2:])
    return shown[:, top : max(bottom, top + 1), left : max(right, left + 1)]
