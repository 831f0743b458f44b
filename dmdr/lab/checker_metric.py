"""The metric lab-checker: the scores `strict` and `soft`, and a line of GenEval's results.jsonl for each image."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import ConfigError
from dmdr.lab.checker import Verdict, check
from dmdr.lab.geneval_line import GenEvalLine
from dmdr.lab.vocabulary import SHAPES
from dmdr.lab.world import SIZE


class LabChecker:
    """Judges images of the prompts that have GenEval metadata of the world of shapes."""

    figures = ("strict", "soft")
    writes = "results"

    def judges(self, record: PromptRecord) -> bool:
        """Whether the prompt says what its image must show (tag and include)."""
        return "tag" in record and "include" in record

    def check_prompts(self, records: list[PromptRecord]) -> None:
        """Refuse prompts that it cannot judge.

        Raises:
            ConfigError: no prompt has metadata, or some metadata names a class of another world.
        """
        judged = [record for record in records if self.judges(record)]
        if not judged:
            raise ConfigError(
                f"evaluate.metrics asks for lab-checker, but none of the {len(records)} evaluation prompts has GenEval "
                "metadata (tag, include); evaluate on lab:held-out, or drop lab-checker"
            )
        foreign = {need["class"] for record in judged for need in record["include"]}.difference(SHAPES)
        if foreign:
            raise ConfigError(
                f"lab-checker knows {', '.join(SHAPES)}, but the evaluation prompts ask for "
                f"{', '.join(sorted(foreign)[:5])}; evaluate on lab:held-out, or drop lab-checker"
            )

    @staticmethod
    def check_size(width: int, height: int) -> None:
        """Raises ConfigError unless images are of the lab's size."""
        if (width, height) != (SIZE, SIZE):
            raise ConfigError(
                f"lab-checker judges {SIZE}x{SIZE} images, but these are {width}x{height}; drop lab-checker from "
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
        verdicts = [check(record, image) for record, image in zip(records, pixels, strict=True)]
        figures = {
            "strict": np.array([float(verdict.strict) for verdict in verdicts]),
            "soft": np.array([verdict.soft for verdict in verdicts]),
        }
        return figures, [build_line(record, verdict) for record, verdict in zip(records, verdicts, strict=True)]


def build_line(record: PromptRecord, verdict: Verdict) -> GenEvalLine:
    """The line of an image. It leaves out objects of no known shape."""
    boxes: dict[str, list[list[float]]] = {}
    for each in verdict.objects:
        if each.shape is not None:
            boxes.setdefault(each.shape, []).append([*each.box, each.overlap])
    return GenEvalLine.build(record, verdict.reason, boxes)
