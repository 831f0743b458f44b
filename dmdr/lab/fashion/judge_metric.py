"""The judge of tinted garments as a metric: `strict`, `color` and `class`, and GenEval's results.jsonl lines."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import ConfigError
from dmdr.lab.fashion import classifier
from dmdr.lab.fashion.judge import Verdict, judge_images
from dmdr.lab.fashion.world import CLASSES
from dmdr.lab.geneval_line import GenEvalLine
from dmdr.lab.world import COLORS, SIZE


class FashionJudge:
    """Judges the prompts that carry GenEval metadata of the world of garments. strict: colour and class are right."""

    figures = ("strict", "color", "class")
    writes = "results"

    def __init__(self) -> None:
        self.classifier = classifier.load_classifier()

    def judges(self, record: PromptRecord) -> bool:
        """Whether the prompt says what its image must show (tag and include)."""
        return "tag" in record and "include" in record

    def check_prompts(self, records: list[PromptRecord]) -> None:
        """Refuse prompts it can say nothing about.

        Raises:
            ConfigError: no prompt has metadata, or some of it is not of this world.
        """
        judged = [record for record in records if self.judges(record)]
        if not judged:
            raise ConfigError(
                f"evaluate.metrics asks for fashion-judge, but none of the {len(records)} evaluation prompts has "
                "GenEval metadata (tag, include); evaluate on fashion:held-out, or drop fashion-judge"
            )
        foreign = [record["prompt"] for record in judged if not one_garment(record)]
        if foreign:
            raise ConfigError(
                f"fashion-judge knows one garment of {', '.join(CLASSES)} in {', '.join(COLORS)}; {len(foreign)} "
                f"evaluation prompts ask for something else, first {foreign[0]!r}; evaluate on fashion:held-out, or "
                "drop fashion-judge"
            )

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[GenEvalLine]]:
        """Scores (B,) by figure and lines of images (B, 3, SIZE, SIZE) in [0, 1].

        Raises:
            ConfigError: the images are not of the lab's size.
        """
        if images.shape[1:] != (3, SIZE, SIZE):
            raise ConfigError(
                f"fashion-judge judges {SIZE}x{SIZE} images; these are {images.shape[3]}x{images.shape[2]}; "
                "drop fashion-judge from evaluate.metrics"
            )
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        found = judge_images(self.classifier, records, pixels)
        color = np.array([float(verdict.color_right) for verdict in found])
        name = np.array([float(verdict.name_right) for verdict in found])
        figures = {"strict": color * name, "color": color, "class": name}
        return figures, [build_line(*pair) for pair in zip(records, found, strict=True)]


def one_garment(record: PromptRecord) -> bool:
    """Whether metadata asks for one garment of this world, in one of its colours."""
    if len(record["include"]) != 1:
        return False
    (need,) = record["include"]
    return need["count"] == 1 and need["class"] in CLASSES and need.get("color") in COLORS


def build_line(record: PromptRecord, verdict: Verdict) -> GenEvalLine:
    """The line of an image."""
    boxes = {verdict.name: [[*verdict.box, verdict.certainty]]} if verdict.name else {}
    return GenEvalLine.build(record, verdict.reason, boxes)
