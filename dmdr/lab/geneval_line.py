"""A line of GenEval's results file. GenEval and the lab's judges use it to report whether an image is correct."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from dmdr.config.prompt_record import PromptRecord


@dataclass(frozen=True)
class GenEvalLine:
    """What GenEval's evaluate_images.py writes for an image, without the file name. summary_scores.py reads it.

    tag: the task. reason: why the image is not correct, empty if it is correct. metadata: the prompt record as JSON.
    details: class -> its objects as [x1, y1, x2, y2, score], as JSON.
    """

    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: str

    @classmethod
    def build(cls, record: PromptRecord, reason: str, objects: Mapping[str, Sequence[Sequence[float]]]) -> GenEvalLine:
        """The line of an image of this prompt. reason, objects: the fields `reason` and `details`."""
        return cls(
            tag=record["tag"],
            prompt=record["prompt"],
            correct=not reason,
            reason=reason,
            metadata=json.dumps(record),
            details=json.dumps(objects),
        )

    def mark_broken(self) -> GenEvalLine:
        """The same line for an image with NaN or infinite values: not correct, no objects."""
        return replace(self, correct=False, reason="the image is not a number", details="{}")

    def to_json(self) -> dict[str, object]:
        """The line as a JSON object of the results file."""
        return asdict(self)
