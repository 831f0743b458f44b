"""DPG-Bench: how many of the questions about a dense prompt a model answers with yes, in 0 to 100.

An image here is one of the four that the official layout has in a grid; a prompt's score is the mean over its images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dmdr.errors import ConfigError
from dmdr.metrics import dpg_rules
from dmdr.metrics.dpg_questions import Question, read_questions
from dmdr.metrics.vqa import BlipVQA
from dmdr.promptset import PromptRecord

FIGURE, OFFICIAL = "dpg-bench", "dpg-bench (official)"


class DPGBench:
    """Judges the prompts whose item_id the file of questions has."""

    figures = (FIGURE,)
    writes = "answers"

    def __init__(self, questions: dict[str, list[Question]], first: tuple[str, int], vqa: BlipVQA) -> None:
        self.questions, self.first, self.vqa = questions, first, vqa

    @classmethod
    def load(cls, weights: dict[str, Path], device: str) -> DPGBench:
        """weights: of the sets dpg-questions and vqa."""
        return cls(*read_questions(weights["dpg-questions"]), BlipVQA(weights["vqa"], device))

    def judges(self, record: PromptRecord) -> bool:
        return record.get("item_id") in self.questions

    @staticmethod
    def check_prompts(records: list[PromptRecord]) -> None:
        """Raises ConfigError when no prompt has an item_id."""
        if not any("item_id" in record for record in records):
            raise ConfigError(
                f"evaluate.metrics asks for dpg-bench, but none of the {len(records)} evaluation prompts has an "
                "item_id; evaluate on set:dpg-bench, or drop dpg-bench"
            )

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[dict | None]]:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], and of each {"item_id", "answers": question -> text}."""
        scores, lines = [], []
        for image, record in zip(images, records, strict=True):
            asked = self.questions[record["item_id"]]
            answers = self.vqa(image[None], [each.text for each in asked])
            told = {str(each.number): answer for each, answer in zip(asked, answers, strict=True)}
            lines.append({"item_id": record["item_id"], "answers": told})
            scores.append(100 * dpg_rules.image_score(asked, answered_yes(told)))
        return {FIGURE: np.array(scores)}, lines

    def categories(self, lines: list[dict]) -> dict[str, dict]:
        """Of all lines of a model: figure -> {"tags", "overall"}, as it should be and as the official script has it.

        Where an image was not a number, which nobody can be asked about, no mean is one.
        """
        images: dict[str, list[dict[int, bool]]] = {}
        for line in lines:
            answers = line["answers"] or dict.fromkeys((str(q.number) for q in self.questions[line["item_id"]]), "no")
            images.setdefault(line["item_id"], []).append(answered_yes(answers))
        found = {
            FIGURE: dpg_rules.score_correctly(self.questions, images),
            OFFICIAL: dpg_rules.score_as_published(self.questions, images, self.first),
        }
        if any(line["answers"] is None for line in lines):
            for each in found.values():
                each["tags"] = {name: {**of, "mean": None} for name, of in each["tags"].items()}
                each["overall"] = None
        return found


def answered_yes(answers: dict[str, str]) -> dict[int, bool]:
    return {int(number): answer.lower() == "yes" for number, answer in answers.items()}
