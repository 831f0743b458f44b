"""DPG-Bench: the share of questions about an image that a VQA model answers with yes, in 0 to 100.

The official layout puts four images in a grid; here each of them is an image of its own. A prompt's score is the mean
over its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import ConfigError
from dmdr.metrics import dpg_rules
from dmdr.metrics.dpg_questions import QuestionTable, read_questions
from dmdr.metrics.scorecard import TagMean, TagMeans
from dmdr.metrics.vqa import BlipVQA

FIGURE, OFFICIAL = "dpg-bench", "dpg-bench (official)"


@dataclass(frozen=True)
class AnswersLine:
    """The answers about one image. answers: number of the question -> text; None if the image is broken."""

    item_id: str
    answers: Mapping[str, str] | None

    def mark_broken(self) -> AnswersLine:
        """The line of an image with values that are not numbers, about which no question can be answered."""
        return replace(self, answers=None)

    def to_json(self) -> dict[str, object]:
        """The line as JSON, for the file of answers."""
        return asdict(self)


class DPGBench:
    """Judges images of the prompts whose item_id is in the file of questions."""

    figures = (FIGURE,)
    writes = "answers"

    def __init__(self, table: QuestionTable, vqa: BlipVQA) -> None:
        self.table, self.vqa = table, vqa

    @classmethod
    def load(cls, weights: dict[str, Path], device: str) -> DPGBench:
        """weights: the files of the sets dpg-questions and vqa."""
        return cls(read_questions(weights["dpg-questions"]), BlipVQA(weights["vqa"], device))

    def judges(self, record: PromptRecord) -> bool:
        return record.get("item_id") in self.table.questions

    @staticmethod
    def check_prompts(records: list[PromptRecord]) -> None:
        """Refuse prompts that it cannot judge.

        Raises:
            ConfigError: no prompt has an item_id.
        """
        if not any("item_id" in record for record in records):
            raise ConfigError(
                f"evaluate.metrics has dpg-bench, but none of the {len(records)} evaluation prompts has an item_id; "
                "evaluate on set:dpg-bench, or drop dpg-bench"
            )

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[AnswersLine]]:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], and the answers about each."""
        scores, lines = [], []
        for image, record in zip(images, records, strict=True):
            questions = self.table.questions[record["item_id"]]
            texts = self.vqa(image[None], [question.text for question in questions])
            answers = {str(question.number): text for question, text in zip(questions, texts, strict=True)}
            lines.append(AnswersLine(record["item_id"], answers))
            scores.append(100 * dpg_rules.score_image(questions, list_yes(answers)))
        return {FIGURE: np.array(scores)}, lines

    def average_by_category(self, lines: Sequence[AnswersLine]) -> dict[str, TagMeans]:
        """Average all lines of a model by category: correctly, and as the official script does.

        Returns figure -> means. All means are None if an image was broken.
        """
        images: dict[str, list[dict[int, bool]]] = {}
        for line in lines:
            no = {question.number: False for question in self.table.questions[line.item_id]}
            images.setdefault(line.item_id, []).append(no if line.answers is None else list_yes(line.answers))
        means = {
            FIGURE: dpg_rules.score_correctly(self.table.questions, images),
            OFFICIAL: dpg_rules.score_as_published(self.table.questions, images, self.table.first),
        }
        if any(line.answers is None for line in lines):
            return {figure: _remove_means(each) for figure, each in means.items()}
        return means


def _remove_means(means: TagMeans) -> TagMeans:
    return TagMeans(tags={name: TagMean(mean=None, n=each.n) for name, each in means.tags.items()}, overall=None)


def list_yes(answers: Mapping[str, str]) -> dict[int, bool]:
    """Number of the question -> whether its answer is yes."""
    return {int(number): answer.lower() == "yes" for number, answer in answers.items()}
