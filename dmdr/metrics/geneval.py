"""GenEval: check the objects, counts, colours and positions in an image against its prompt, by a detector and CLIP."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import ConfigError
from dmdr.lab.geneval_line import GenEvalLine
from dmdr.metrics.detector import NAMES, Detector
from dmdr.metrics.geneval_colours import ColourClassifier
from dmdr.metrics.geneval_rules import COLOURS, POSITIONS, Detections, count_detections, judge_detections


class GenEval:
    """Judges images of the prompts that carry GenEval's metadata: 1 is correct, 0 is not."""

    figures = ("geneval",)
    writes = "results"

    def __init__(self, detector: Detector, colours: ColourClassifier) -> None:
        self.detector, self.colours = detector, colours

    @classmethod
    def load(cls, weights: dict[str, Path], device: str) -> GenEval:
        """weights: the files of the sets mask2former and clip-vit-l-14."""
        return cls(Detector(weights["mask2former"], device), ColourClassifier(weights["clip-vit-l-14"], device))

    @staticmethod
    def judges(record: PromptRecord) -> bool:
        """Whether the prompt has GenEval's metadata (tag and include)."""
        return "tag" in record and "include" in record

    @classmethod
    def check_prompts(cls, records: list[PromptRecord]) -> None:
        """Refuse prompts that it cannot judge.

        Raises:
            ConfigError: no prompt has metadata, or some metadata does not parse or asks for something that the detector
                does not know.
        """
        judged = [record for record in records if cls.judges(record)]
        if not judged:
            raise ConfigError(
                f"evaluate.metrics has geneval, but none of the {len(records)} evaluation prompts has metadata (tag, "
                "include); evaluate on set:geneval, or drop geneval"
            )
        for record in judged:
            fault = find_fault(record)
            if fault:
                raise ConfigError(f"GenEval's metadata of {record['prompt']!r} {fault}; mend the row, or drop geneval")

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[GenEvalLine]]:
        """Scores (B,) and lines of images (B, 3, H, W) in [0, 1]."""
        lines = []
        for image, record, detections in zip(images, records, self.detector(images), strict=True):
            objects = count_detections(detections, record["tag"])
            reason = judge_detections(record, objects, partial(self.colours, image))
            lines.append(build_line(record, reason, objects))
        return {"geneval": np.array([float(line.correct) for line in lines])}, lines


def build_line(record: PromptRecord, reason: str, objects: Detections) -> GenEvalLine:
    """Build the line of an image. reason: from `judge_detections`; objects: the detections that count."""
    return GenEvalLine.build(
        record, reason, {name: [[*each.box, each.score] for each in detections] for name, detections in objects.items()}
    )


def find_fault(record: PromptRecord) -> str:
    """Say what is wrong with the metadata of a prompt, as the end of a sentence; empty if nothing is."""
    for key in ("include", "exclude"):
        clauses = record.get(key, [])
        if not isinstance(clauses, list) or not all(isinstance(each, dict) for each in clauses):
            return f"has {key} that is not a list of clauses"
        for number, clause in enumerate(clauses):
            count = clause.get("count")
            if not isinstance(clause.get("class"), str) or type(count) is not int or count < 1:
                return f"has a clause of {key} without class and count: {clause}"
            if clause["class"] not in NAMES:  # no image would ever be correct
                return f"asks for {clause['class']}, which its detector does not know"
            if clause.get("color", COLOURS[0]) not in COLOURS:
                return f"asks for {clause['color']}; GenEval knows {', '.join(COLOURS)}"
            if "position" in clause and not _is_position(clause["position"], number):
                where, known = clause["position"], ", ".join(POSITIONS)
                return f"has position {where}, which is none of {known} and the number of a clause before"
    return ""


def _is_position(where: object, number: int) -> bool:
    if not isinstance(where, list | tuple) or len(where) != 2:
        return False
    return where[0] in POSITIONS and type(where[1]) is int and 0 <= where[1] < number
