"""Compute DPG-Bench's scores from answers: correctly, and as its compute_dpg_bench.py does (at 025f650).

The official script departs from the correct arithmetic:
1. It drops the file's first row. That prompt then fails if another of its questions depends on the dropped one.
2. It takes categories from the last image alone, before answers are zeroed for their parents.
3. It leaves prompts that fail out of the mean, without a word.
4. It goes through a prompt's questions once, in the file's order. A question that stands before its parent is not
   zeroed when the parent is zeroed later.
5. It sees at most four images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dmdr.metrics.dpg_questions import Question, QuestionKey
from dmdr.metrics.scorecard import TagMean, TagMeans

Answers = Mapping[int, bool]  # number of the question -> whether the answer was yes
CROPS = 4  # images of the script's grid


def zero_dependents(questions: Sequence[Question], answers: Answers) -> dict[int, float]:
    """The score of each question: 1 for yes, but 0 if the score of any of its parents is 0."""
    by_number = {each.number: each for each in questions}
    scores: dict[int, float] = {}

    def score(number: int) -> float:
        if number not in scores:
            scores[number] = float(answers[number] and all(score(parent) for parent in by_number[number].parents))
        return scores[number]

    return {each.number: score(each.number) for each in questions}


def score_image(questions: Sequence[Question], answers: Answers) -> float:
    """The mean over the prompt's questions, in [0, 1]."""
    return float(np.mean(list(zero_dependents(questions, answers).values())))


def score_correctly(questions: Mapping[str, Sequence[Question]], images: Mapping[str, Sequence[Answers]]) -> TagMeans:
    """Means by category in 0 to 100, over all prompts and all of their images.

    images: item -> the answers about each of its images. n of a category: the number of prompts with a question in it.
    """
    values: dict[str, list[float]] = {}
    prompts: dict[str, set[str]] = {}
    overall = []
    for item, image_answers in images.items():
        scores = [zero_dependents(questions[item], answers) for answers in image_answers]
        overall.append(float(np.mean([list(each.values()) for each in scores])))
        for question in questions[item]:
            for category in {question.category, name_broad_category(question.category)}:
                values.setdefault(category, []).extend(each[question.number] for each in scores)
                prompts.setdefault(category, set()).add(item)
    return _summarize(values, prompts, overall)


def score_as_published(
    questions: Mapping[str, Sequence[Question]], images: Mapping[str, Sequence[Answers]], first: QuestionKey
) -> TagMeans:
    """The means that the official script prints. first: the question of the file's first row."""
    values: dict[str, list[float]] = {}
    prompts: dict[str, set[str]] = {}
    overall = []
    for item, all_answers in images.items():
        kept = [question for question in questions[item] if (item, question.number) != first]
        image_answers = all_answers[:CROPS]
        scores = [_score_image_as_published(kept, answers) for answers in image_answers]
        complete = [score for score in scores if score is not None]
        if len(complete) < len(scores):
            continue
        overall.append(float(np.mean(complete)))
        for question in kept:
            for category in {question.category, name_broad_category(question.category)}:
                values.setdefault(category, []).append(float(image_answers[-1][question.number]))
                prompts.setdefault(category, set()).add(item)
    return _summarize(values, prompts, overall)


def _score_image_as_published(questions: Sequence[Question], answers: Answers) -> float | None:
    """The score of one image, from one pass in the file's order, as in the script.

    None if the script fails, at a question whose parent it dropped.
    """
    scores = {each.number: float(answers[each.number]) for each in questions}
    for each in questions:
        for parent in each.parents:
            if parent not in scores:
                return None  # the script catches its own KeyError and drops the prompt
            if scores[parent] == 0:
                scores[each.number] = 0.0
                break  # the script does not look at the parents after this one
    return float(np.mean(list(scores.values()))) if scores else None


def name_broad_category(category: str) -> str:
    """The first level of a DPG-Bench category: the text before the dash."""
    return category.split("-")[0].strip()


def _summarize(
    values: Mapping[str, Sequence[float]], prompts: Mapping[str, set[str]], overall: Sequence[float]
) -> TagMeans:
    tags = {name: TagMean(mean=100 * float(np.mean(values[name])), n=len(prompts[name])) for name in sorted(values)}
    return TagMeans(tags=tags, overall=100 * float(np.mean(overall)) if overall else None)
