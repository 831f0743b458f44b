"""The metric fashion-judge: the scores `strict`, `color` and `class`, and lines of GenEval's results.jsonl."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import ConfigError
from dmdr.lab.fashion import classifier
from dmdr.lab.fashion.judge import Verdict, judge_images
from dmdr.lab.fashion.vocabulary import CLASSES
from dmdr.lab.geneval_line import GenEvalLine
from dmdr.lab.vocabulary import COLORS
from dmdr.lab.world import SIZE


class FashionJudge:
    """Judges images of the prompts that have GenEval metadata of the world of garments.

    strict: whether colour and class are both right.
    """

    figures = ("strict", "color", "class")
    writes = "results"

    def __init__(self) -> None:
        self.classifier = classifier.load_classifier()

    def judges(self, record: PromptRecord) -> bool:
        """Whether the prompt says what its image must show (tag and include)."""
        return "tag" in record and "include" in record

    def check_prompts(self, records: list[PromptRecord]) -> None:
        """Refuse prompts that it cannot judge.

        Raises:
            ConfigError: no prompt has metadata, or some metadata asks for something of another world.
        """
        judged = [record for record in records if self.judges(record)]
        if not judged:
            raise ConfigError(
                f"evaluate.metrics asks for fashion-judge, but none of the {len(records)} evaluation prompts has "
                "GenEval metadata (tag, include); evaluate on fashion:held-out, or drop fashion-judge"
            )
        foreign = [record["prompt"] for record in judged if not asks_for_one_garment(record)]
        if foreign:
            raise ConfigError(
                f"fashion-judge knows one garment of {', '.join(CLASSES)} in {', '.join(COLORS)}, but {len(foreign)} "
                f"evaluation prompts ask for something else, for example {foreign[0]!r}; evaluate on fashion:held-out, "
                "or drop fashion-judge"
            )

    @staticmethod
    def check_size(width: int, height: int) -> None:
        """Raises ConfigError unless images are of the lab's size."""
        if (width, height) != (SIZE, SIZE):
            raise ConfigError(
                f"fashion-judge judges {SIZE}x{SIZE} images, but these are {width}x{height}; drop fashion-judge from "
                "evaluate.metrics"
            )

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[GenEvalLine]]:
        """The scores (B,) by name, and a line for each of the images (B, 3, SIZE, SIZE) in [0, 1].

        Raises:
            ConfigError: the images are not of the lab's size.
        """
        self.check_size(images.shape[3], images.shape[2])
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        verdicts = judge_images(self.classifier, records, pixels)
        color = np.array([float(verdict.color_right) for verdict in verdicts])
        name = np.array([float(verdict.name_right) for verdict in verdicts])
        figures = {"strict": color * name, "color": color, "class": name}
        return figures, [build_line(record, verdict) for record, verdict in zip(records, verdicts, strict=True)]


def asks_for_one_garment(record: PromptRecord) -> bool:
    """Whether the metadata asks for one garment of this world, in one of its colours."""
    if len(record["include"]) != 1:
        return False
    (need,) = record["include"]
    return need["count"] == 1 and need["class"] in CLASSES and need.get("color") in COLORS


def build_line(record: PromptRecord, verdict: Verdict) -> GenEvalLine:
    """The line of an image."""
    boxes = {verdict.name: [[*verdict.box, verdict.certainty]]} if verdict.name else {}
    return GenEvalLine.build(record, verdict.reason, boxes)
