"""Reads scores.jsonl of an evaluation: one line for each prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ScoreLine:
    """One prompt. scores: model -> figure -> score; None where it is not a number.

    A figure that does not judge the prompt is missing.
    """

    index: int
    prompt: str
    scores: dict[str, dict[str, float | None]]


def read_score_lines(folder: Path) -> list[ScoreLine]:
    """The lines of the scores.jsonl in `folder`, in their order."""
    rows = map(json.loads, (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines())
    return [ScoreLine(row["index"], row["prompt"], row["scores"]) for row in rows]
