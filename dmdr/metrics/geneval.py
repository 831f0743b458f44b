"""GenEval: whether an image shows the objects, counts, colours and positions of its prompt, by a detector and CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from dmdr.errors import ConfigError
from dmdr.metrics.detector import NAMES, Detector
from dmdr.metrics.geneval_colours import ColourClassifier
from dmdr.metrics.geneval_rules import COLOURS, POSITIONS, Detection, count_detections, judge_detections
from dmdr.promptset import PromptRecord


class GenEval:
    """Judges the prompts that carry GenEval's metadata; 1 is correct, 0 is not."""

    figures = ("geneval",)
    writes = "results"

    def __init__(self, detector: Detector, colours: ColourClassifier) -> None:
        self.detector, self.colours = detector, colours

    @classmethod
    def load(cls, weights: dict[str, Path], device: str) -> GenEval:
        """weights: of the sets mask2former and clip-vit-l-14."""
        return cls(Detector(weights["mask2former"], device), ColourClassifier(weights["clip-vit-l-14"], device))

    @staticmethod
    def judges(record: PromptRecord) -> bool:
        """Whether the prompt says what its image must show (tag and include)."""
        return "tag" in record and "include" in record

    @classmethod
    def check_prompts(cls, records: list[PromptRecord]) -> None:
        """Refuse prompts that it can say nothing about.

        Raises:
            ConfigError: no prompt has metadata, or a row of it does not parse or asks for what is never found.
        """
        judged = [record for record in records if cls.judges(record)]
        if not judged:
            raise ConfigError(
                f"evaluate.metrics asks for geneval, but none of the {len(records)} evaluation prompts has "
                "metadata (tag, include); evaluate on set:geneval, or drop geneval"
            )
        for record in judged:
            if why := unreadable(record):
                raise ConfigError(f"GenEval's metadata of {record['prompt']!r} {why}; mend the row, or drop geneval")

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[dict | None]]:
        """Scores (B,) and GenEval's lines, less the file name; images (B, 3, H, W) in [0, 1]."""
        correct, lines = np.zeros(len(records)), []
        for place, (image, record, seen) in enumerate(zip(images, records, self.detector(images), strict=True)):
            found = count_detections(seen, record["tag"])
            right, reason = judge_detections(
                record, found, lambda name, objects, image=image: self.colours(image, name, objects)
            )
            correct[place] = float(right)
            lines.append(line(record, right, reason, found))
        return {"geneval": correct}, lines


def line(record: PromptRecord, correct: bool, reason: str, found: dict[str, list[Detection]]) -> dict:
    """What evaluate_images.py writes for an image; its summary_scores.py reads it unchanged."""
    return {
        "tag": record["tag"],
        "prompt": record["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(record),
        "details": json.dumps({name: [[*each.box, each.score] for each in seen] for name, seen in found.items()}),
    }


def unreadable(record: PromptRecord) -> str:
    """What is wrong with a row of metadata, as a clause; empty if nothing is."""
    for key in ("include", "exclude"):
        clauses = record.get(key, [])
        if not isinstance(clauses, list) or not all(isinstance(each, dict) for each in clauses):
            return f"has {key} that is no list of clauses"
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
