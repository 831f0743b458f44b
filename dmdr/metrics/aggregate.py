"""Build the scorecard from the scores of all models: means, intervals, paired differences and means by tag."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from dmdr.metrics.intervals import RESAMPLES, Interval, bootstrap_differences, bootstrap_intervals
from dmdr.metrics.scorecard import (
    IntervalMethod,
    MetricFacts,
    MetricRow,
    MissingMetric,
    Model,
    ModelOnCard,
    PairedDifference,
    Scorecard,
    TagMean,
    TagMeans,
)

METHOD = "percentile bootstrap over prompts, 95 %"


@dataclass(frozen=True)
class Scores:
    """The scores of every model in one figure.

    by_model: name -> scores (prompts,), in the same order for all models. tags: GenEval's task of each prompt, or None.
    """

    by_model: dict[str, np.ndarray]
    tags: list[str | None]

    def matrix(self) -> np.ndarray:
        """(models, prompts)."""
        return np.stack(list(self.by_model.values()))


@dataclass(frozen=True)
class Conditions:
    """The conditions under which the scores were measured.

    prompts: number of prompts, with `images_per_prompt` images each; a score is the mean over them. seed: of the
    resamples. trained_on: figures that a compared model was trained to raise. missing: metric -> why it was not
    measured. about: figure -> description. truncated: evaluation prompts that are longer than the text encoder reads.
    """

    run: str
    prompts: int
    seed: int
    images_per_prompt: int = 1
    trained_on: set[str] = field(default_factory=set)
    missing: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, MetricFacts] = field(default_factory=dict)
    truncated: int = 0


def build_scorecard(
    conditions: Conditions,
    models: list[Model],
    scores: Mapping[str, Scores],
    categories: Mapping[str, Mapping[str, TagMeans]] | None = None,
) -> Scorecard:
    """Build the scorecard. Numbers that are not finite become None.

    scores: figure -> its Scores on the prompts that it judges, with the models in the order of `models`. The first
    model is compared with all others. categories: figure -> model -> means by tag, from metrics that compute these
    themselves; they replace the means over `tags`.
    """
    metrics: list[MetricRow] = []
    paired: list[PairedDifference] = []
    tags: dict[str, dict[str, TagMeans]] = {}
    for figure, each in scores.items():
        metrics += _build_rows(figure, models, each, conditions)
        paired += _build_differences(figure, models, each, conditions.seed)
        if any(each.tags) and not figure.startswith("diversity/"):
            tags[figure] = {model.name: average_by_tag(each.by_model[model.name], each.tags) for model in models}
    tags |= {figure: dict(by_model) for figure, by_model in (categories or {}).items()}
    return Scorecard(
        run=conditions.run,
        prompts=conditions.prompts,
        images_per_prompt=conditions.images_per_prompt,
        intervals=IntervalMethod(method=METHOD, resamples=RESAMPLES, seed=conditions.seed),
        models=tuple(ModelOnCard(**asdict(model), label=model.name, nfe=model.nfe) for model in models),
        metrics=tuple(metrics),
        paired=tuple(paired),
        tags=tags,
        missing=tuple(MissingMetric(metric=name, why=why) for name, why in conditions.missing.items()),
        about=dict(conditions.about),
        truncated=conditions.truncated,
    )


def _build_rows(figure: str, models: list[Model], scores: Scores, conditions: Conditions) -> list[MetricRow]:
    matrix = scores.matrix()
    return [
        MetricRow(
            name=figure,
            model=model.name,
            mean=finite_or_none(interval.mean),
            low=finite_or_none(interval.low),
            high=finite_or_none(interval.high),
            n=len(scores.tags),
            broken=int((~np.isfinite(scores_P)).sum()),
            trained_on=figure in conditions.trained_on,
        )
        for model, scores_P, interval in zip(models, matrix, bootstrap_intervals(matrix, conditions.seed), strict=True)
    ]


def _build_differences(figure: str, models: list[Model], scores: Scores, seed: int) -> list[PairedDifference]:
    intervals = bootstrap_differences(scores.matrix(), seed)
    return [
        build_difference(figure, models[0].name, other.name, interval, n=len(scores.tags))
        for other, interval in zip(models[1:], intervals, strict=True)
    ]


def build_difference(metric: str, a: str, b: str, interval: Interval, *, n: int) -> PairedDifference:
    """Convert the interval of a difference on n prompts for the scorecard."""
    return PairedDifference(
        metric=metric,
        a=a,
        b=b,
        difference=finite_or_none(interval.mean),
        low=finite_or_none(interval.low),
        high=finite_or_none(interval.high),
        n=n,
    )


def average_by_tag(scores_P: np.ndarray, tags: list[str | None]) -> TagMeans:
    """Means of scores (prompts,) by tag. GenEval's overall is the unweighted mean of the tags' means."""
    by_tag = {tag: scores_P[[each == tag for each in tags]] for tag in sorted({tag for tag in tags if tag is not None})}
    means = {tag: TagMean(mean=finite_or_none(scores.mean()), n=len(scores)) for tag, scores in by_tag.items()}
    overall = np.mean([scores.mean() for scores in by_tag.values()])
    return TagMeans(tags=means, overall=finite_or_none(overall))


def finite_or_none(value: float) -> float | None:
    """The number for JSON, which has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None
