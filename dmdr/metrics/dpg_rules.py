"""DPG-Bench's arithmetic: answers -> scores, as it should be and as its compute_dpg_bench.py (at 025f650) has it.

The official script
1. drops the file's first row, after which that prompt fails if another of its questions depends on the dropped one;
2. takes categories from the last image alone, before answers are zeroed for their parents;
3. leaves prompts that fail out of the mean without a word;
4. goes through a prompt's questions once, in the file's order: one before its parent misses what becomes of that;
5. sees at most four images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dmdr.metrics.dpg_questions import Question

Answers = Mapping[int, bool]  # question -> whether the answer was yes
CROPS = 4  # of the script's grid


def zero_dependents(questions: Sequence[Question], answers: Answers) -> dict[int, float]:
    """Each question's score: 1 for yes, but 0 where one that it depends on, however far, has 0."""
    by_number = {each.number: each for each in questions}
    found: dict[int, float] = {}

    def score(number: int) -> float:
        if number not in found:
            found[number] = float(answers[number] and all(score(parent) for parent in by_number[number].parents))
        return found[number]

    return {each.number: score(each.number) for each in questions}


def image_score(questions: Sequence[Question], answers: Answers) -> float:
    """In [0, 1]: the mean over the prompt's questions."""
    return float(np.mean(list(zero_dependents(questions, answers).values())))


def score_correctly(questions: Mapping[str, Sequence[Question]], images: Mapping[str, Sequence[Answers]]) -> dict:
    """{"tags": {category: {"mean", "n"}}, "overall"} in 0 to 100 of all prompts and all of their images.

    images: item -> the answers about each of its images. n: prompts with a question of that category.
    """
    by: dict[str, list[list[float]]] = {}
    overall = []
    for item, of_item in images.items():
        asked, scores = questions[item], [zero_dependents(questions[item], answers) for answers in of_item]
        overall.append(np.mean([list(each.values()) for each in scores]))
        mine: dict[str, list[float]] = {}
        for each in asked:
            for category in {each.category, broad(each.category)}:
                mine.setdefault(category, []).extend(score[each.number] for score in scores)
        for category, values in mine.items():
            by.setdefault(category, []).append(values)
    return _summarize({name: [v for each in values for v in each] for name, values in by.items()}, by, overall)


def score_as_published(
    questions: Mapping[str, Sequence[Question]], images: Mapping[str, Sequence[Answers]], first: tuple[str, int]
) -> dict:
    """The same as the official script prints it. first: (item, question) of the file's first row."""
    by: dict[str, list[float]] = {}
    counted: dict[str, list[str]] = {}
    overall = []
    for item, of_item in images.items():
        asked = [each for each in questions[item] if (item, each.number) != first]
        scores = [_score_image_as_published(asked, answers) for answers in of_item[:CROPS]]
        if None in scores:
            continue
        overall.append(np.mean(scores))
        for each in asked:
            for category in {each.category, broad(each.category)}:
                by.setdefault(category, []).append(float(of_item[:CROPS][-1][each.number]))
                counted.setdefault(category, []).append(item)
    return _summarize(by, {name: sorted(set(items)) for name, items in counted.items()}, overall)


def _score_image_as_published(questions: Sequence[Question], answers: Answers) -> float | None:
    """One image's score in the script's one pass in the file's order; None where it fails, at a question that it
    dropped."""
    scores = {each.number: float(answers[each.number]) for each in questions}
    for each in questions:
        for parent in each.parents:
            if parent not in scores:
                return None  # its KeyError is caught, and the prompt is gone
            if scores[parent] == 0:
                scores[each.number] = 0.0
                break  # and does not come to a parent behind it
    return float(np.mean(list(scores.values()))) if scores else None


def broad(category: str) -> str:
    """DPG-Bench's first level: what stands before the dash."""
    return category.split("-")[0].strip()


def _summarize(
    scores: Mapping[str, Sequence[float]], prompts: Mapping[str, Sequence], overall: Sequence[float]
) -> dict:
    tags = {name: {"mean": 100 * float(np.mean(scores[name])), "n": len(prompts[name])} for name in sorted(scores)}
    return {"tags": tags, "overall": 100 * float(np.mean(overall)) if overall else None}
