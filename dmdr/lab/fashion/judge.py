"""The judge of tinted garments: the colour in closed form, the class by the classifier. Nothing is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.lab.fashion.classifier import Classifier
from dmdr.lab.fashion.world import CLASSES, untint

FAINT = 0.15  # brightness of a garment below which a pixel is background, for the box


@dataclass(frozen=True)
class Verdict:
    """What was asked and what is seen. color: None for a motley image; name: None for a blank one.

    box: (x0, y0, x1, y1) in pixels; certainty: the classifier's, of the class it sees.
    """

    asked_color: str
    asked_name: str
    color: str | None
    name: str | None
    box: tuple[float, float, float, float]
    certainty: float

    @property
    def color_right(self) -> bool:
        return self.color == self.asked_color

    @property
    def name_right(self) -> bool:
        return self.name == self.asked_name

    @property
    def reason(self) -> str:
        """GenEval's: empty when all is right, else the first thing that is wrong."""
        if not self.name_right:
            return f"expected {self.asked_name}>=1, found {self.name or 'nothing'}"
        if not self.color_right:
            return f"expected {self.asked_color} {self.asked_name}>=1, found {self.color or 'several colours'}"
        return ""


@torch.no_grad()
def judge_images(classifier: Classifier, records: Sequence[PromptRecord], images: np.ndarray) -> list[Verdict]:
    """One for each image (B, SIZE, SIZE, 3) uint8."""
    found = [untint(image) for image in images]
    garments = torch.from_numpy(np.stack([each.garment for each in found])).float()
    chances = classifier(garments[:, None]).softmax(1)
    result = []
    for record, seen, chance in zip(records, found, chances, strict=True):
        (need,) = record["include"]
        rows, columns = np.nonzero(seen.garment >= FAINT)
        blank = seen.share == 0 or not len(rows)
        box = (0.0, 0.0, 0.0, 0.0)
        if not blank:
            box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        name = None if blank else CLASSES[int(chance.argmax())]
        result.append(Verdict(need["color"], need["class"], seen.color, name, box, float(chance.max())))
    return result
