"""The protocol of a metric, which gives each image one number for each of its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord


class Line(Protocol):
    """The result of a metric for one image, as a line of its file."""

    def mark_broken(self) -> Line:
        """The line of an image with values that are not numbers."""

    def to_json(self) -> dict[str, object]:
        """The line as JSON, for the file."""


class Metric(Protocol):
    """Judges images of prompts. Higher is better in every figure."""

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the numbers that it gives each image."""

    @property
    def writes(self) -> str | None:
        """Its lines are written to <writes>-<model>.jsonl; None if it writes no lines."""

    def judges(self, record: PromptRecord) -> bool:
        """Whether the metric can judge images of this prompt."""

    def check_prompts(self, records: list[PromptRecord]) -> None:
        """Refuse prompts that it cannot judge.

        Raises:
            ConfigError: it can judge none of the prompts, or the metadata of one is wrong.
        """

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], Sequence[Line | None]]:
        """Scores (B,) by figure of images (B, 3, H, W) in [0, 1], and a line (or None) for each."""
