"""Scores of all models on the same prompts -> the scorecard: means, intervals, paired differences, GenEval's tasks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from dmdr.metrics.intervals import RESAMPLES, Interval, bootstrap_differences, bootstrap_intervals

SCHEMA = 2


@dataclass(frozen=True)
class Model:
    """One contestant. nfe: forwards of the network an image; guidance doubles them, unless it is an input."""

    name: str
    steps: int
    guidance_scale: float
    guidance_is_input: bool = False

    @property
    def nfe(self) -> int:
        return self.steps * (2 if self.guidance_scale > 1 and not self.guidance_is_input else 1)


@dataclass(frozen=True)
class Scores:
    """One figure of every model. by_model: name -> (prompts,) in the same order; tags: GenEval's, None without one."""

    by_model: dict[str, np.ndarray]
    tags: list[str | None]

    def matrix(self) -> np.ndarray:
        """(models, prompts)."""
        return np.stack(list(self.by_model.values()))


def build_scorecard(
    run: str,
    models: list[Model],
    *,
    scores: dict[str, Scores],
    trained_on: set[str],
    prompts: int,
    seed: int,
    images: int = 1,
) -> dict:
    """The scorecard as JSON data: a number that is not finite is null, and `broken` counts its prompts.

    scores: figure -> its Scores, whose models are `models` in their order; the first is compared with all others.
    prompts: how many were sampled, `images` of each, over which a score is the mean; a figure's n is smaller where it
    judges only some. seed: of the resamples.
    """
    metrics, paired, tags = [], [], {}
    for figure, each in scores.items():
        matrix, judged = each.matrix(), len(each.tags)
        for model, scores_P, found in zip(models, matrix, bootstrap_intervals(matrix, seed), strict=True):
            broken = int((~np.isfinite(scores_P)).sum())
            metrics.append(
                {"name": figure, "model": model.name, **_numbers(found), "n": judged, "broken": broken}
                | {"trained_on": figure in trained_on}
            )
        for model, found in zip(models[1:], bootstrap_differences(matrix, seed), strict=True):
            ends = _numbers(found)
            paired.append(
                {"metric": figure, "a": models[0].name, "b": model.name, "difference": ends.pop("mean"), **ends}
            )
        if any(each.tags) and not figure.startswith("diversity/"):
            tags[figure] = {model.name: average_by_tag(each.by_model[model.name], each.tags) for model in models}
    return {
        "schema": SCHEMA,
        "run": run,
        "prompts": prompts,
        "images_per_prompt": images,
        "intervals": {"method": "percentile bootstrap over prompts, 95 %", "resamples": RESAMPLES, "seed": seed},
        "models": [asdict(model) | {"label": model.name, "nfe": model.nfe} for model in models],
        "metrics": metrics,
        "paired": paired,
        "tags": tags,
    }


def average_by_tag(scores_P: np.ndarray, tags: list[str | None]) -> dict:
    """{"tags": {tag: {mean, n}}, "overall"}: GenEval's overall is the unweighted mean of the tags' means."""
    by = {tag: scores_P[[each == tag for each in tags]] for tag in sorted({tag for tag in tags if tag is not None})}
    means = {tag: {"mean": _number(scores.mean()), "n": len(scores)} for tag, scores in by.items()}
    return {"tags": means, "overall": _number(np.mean([scores.mean() for scores in by.values()]))}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(found: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in found._asdict().items()}
