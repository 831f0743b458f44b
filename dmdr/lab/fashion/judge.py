"""Judge images of tinted garments: the colour by a formula, the class by the classifier. Nothing is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.lab.fashion.classifier import Classifier
from dmdr.lab.fashion.vocabulary import CLASSES
from dmdr.lab.fashion.world import untint

FAINT = 0.15  # pixels of a garment that are darker than this do not count for its bounding box


@dataclass(frozen=True)
class Verdict:
    """What an image should show and what it shows.

    color: None if the image has several colours or none. name: the class, None if the image is blank. box: (x0, y0, x1,
    y1) in pixels. certainty: the probability that the classifier gives to the class.
    """

    expected_color: str
    expected_name: str
    color: str | None
    name: str | None
    box: tuple[float, float, float, float]
    certainty: float

    @property
    def color_right(self) -> bool:
        return self.color == self.expected_color

    @property
    def name_right(self) -> bool:
        return self.name == self.expected_name

    @property
    def reason(self) -> str:
        """The first thing that is wrong, in GenEval's words; empty if all is right."""
        if not self.name_right:
            return f"expected {self.expected_name}>=1, found {self.name or 'nothing'}"
        if not self.color_right:
            return f"expected {self.expected_color} {self.expected_name}>=1, found {self.color or 'several colours'}"
        return ""


@torch.no_grad()
def judge_images(classifier: Classifier, records: Sequence[PromptRecord], images: np.ndarray) -> list[Verdict]:
    """The verdict on each of the images (B, SIZE, SIZE, 3) uint8."""
    untinted = [untint(image) for image in images]
    garments = torch.from_numpy(np.stack([each.garment for each in untinted])).float()
    probabilities = classifier(garments[:, None]).softmax(1)
    verdicts = []
    for record, content, probability in zip(records, untinted, probabilities, strict=True):
        (need,) = record["include"]
        rows, columns = np.nonzero(content.garment >= FAINT)
        blank = content.share == 0 or not len(rows)
        box = (0.0, 0.0, 0.0, 0.0)
        if not blank:
            box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        name = None if blank else CLASSES[int(probability.argmax())]
        verdicts.append(Verdict(need["color"], need["class"], content.color, name, box, float(probability.max())))
    return verdicts
