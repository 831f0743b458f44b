"""Several scorecards as one, whose models are the students of the runs and their teachers, each teacher once.

The first run is compared with each of the others, prompt by prompt, on the prompts that both were judged on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dmdr.metrics.aggregate import build_difference
from dmdr.metrics.intervals import bootstrap_differences
from dmdr.metrics.scorecard import (
    Figures,
    MetricFacts,
    MetricRow,
    MissingMetric,
    ModelOnCard,
    PairedDifference,
    Spread,
    TagMeans,
)
from stages.reports.comparison.results import EvaluatedRun, Prompt
from stages.reports.stage_times import list_stage_times, sum_training

TEACHER = "teacher"


@dataclass(frozen=True)
class ComparedModel:
    """A model of the page. owners: the runs that judged it, more than one for a shared teacher; name: there."""

    owners: tuple[EvaluatedRun, ...]
    name: str

    @property
    def images(self) -> dict[int, np.ndarray]:
        """place -> image (H, W, 3) uint8, of the first owner."""
        return self.owners[0].images[self.name]

    @property
    def scores(self) -> dict[str, dict[int, float]]:
        """figure -> place -> score, of the first owner."""
        return self.owners[0].scores[self.name]

    @property
    def seconds_per_image(self) -> float | None:
        return self.owners[0].speed.seconds_per_image[self.name]


class TeacherKey(NamedTuple):
    """Teachers with the same key drew the same images."""

    fingerprint: str
    steps: int
    guidance_scale: float
    prompts: tuple[Prompt, ...]
    seed: int
    images_per_prompt: int


def list_models(runs: list[EvaluatedRun]) -> dict[str, ComparedModel]:
    """Name on the page -> model: the students first, each by the name of its run, then the teachers."""
    models = {run.run: ComparedModel((run,), run.student.name) for run in runs}
    owners: dict[TeacherKey, list[EvaluatedRun]] = {}
    for run in runs:
        teacher = _find_teacher(run)
        if teacher is not None and run.student.name != TEACHER:
            owners.setdefault(_identify_teacher(run, teacher), []).append(run)
    for number, of_teacher in enumerate(owners.values(), start=1):
        name = TEACHER if len(owners) == 1 else f"{TEACHER} {number}"
        models[name] = ComparedModel(tuple(of_teacher), TEACHER)
    return models


def _find_teacher(run: EvaluatedRun) -> ModelOnCard | None:
    return next((model for model in run.card.models if model.name == TEACHER), None)


def _identify_teacher(run: EvaluatedRun, teacher: ModelOnCard) -> TeacherKey:
    return TeacherKey(
        run.records["evaluate"].teacher_digest,
        teacher.steps,
        teacher.guidance_scale,
        tuple(run.prompts),
        run.card.intervals.seed,
        run.card.images_per_prompt,
    )


def list_trained_on(run: EvaluatedRun) -> set[str]:
    """The figures that the run was trained to raise."""
    return {row.name for row in run.card.metrics if row.trained_on}


def have_same_prompts(a: EvaluatedRun, b: EvaluatedRun) -> bool:
    """Whether both were judged on the same prompts, with the same number of images of each."""
    return a.prompts == b.prompts and a.card.images_per_prompt == b.card.images_per_prompt


def merge_scorecards(runs: list[EvaluatedRun]) -> Figures:
    """The figures of all runs. A figure that any run was trained on is marked for all of them: it cannot decide."""
    tainted = set().union(*map(list_trained_on, runs))
    models: dict[str, ModelOnCard] = {}
    rows: dict[tuple[str, str], MetricRow] = {}
    tags: dict[str, dict[str, TagMeans]] = {}
    for name, model in list_models(runs).items():
        for card in (owner.card for owner in reversed(model.owners)):  # so that the first owner's figures stay
            (on_card,) = [each for each in card.models if each.name == model.name]
            models[name] = on_card.model_copy(update={"name": name, "label": _label_model(name, model.name)})
            for row in card.metrics:
                if row.model == model.name:
                    rows[row.name, name] = row.model_copy(update={"model": name, "trained_on": row.name in tainted})
            for figure, by_model in card.tags.items():
                if model.name in by_model:
                    tags.setdefault(figure, {})[name] = by_model[model.name]
    first, others = runs[0], runs[1:]
    return Figures(
        models=tuple(models.values()),
        metrics=tuple(rows.values()),
        paired=tuple(pair for other in others for pair in _subtract_scores(first, other)),
        tags=tags,
        missing=tuple(
            MissingMetric(metric=f"{each.metric} in {run.run}", why=each.why)
            for run in runs
            for each in run.card.missing
        ),
        about=_merge_descriptions(runs),
    )


def list_seconds(runs: list[EvaluatedRun]) -> dict[str, float | None]:
    """Seconds per image of each model on the page."""
    return {name: model.seconds_per_image for name, model in list_models(runs).items()}


def list_spreads(runs: list[EvaluatedRun]) -> dict[str, Spread]:
    """The spread of these, of the models whose evaluation measured it."""
    spreads = {name: model.owners[0].speed.spread.get(model.name) for name, model in list_models(runs).items()}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def sum_training_of(runs: list[EvaluatedRun]) -> tuple[str, dict[str, float]] | None:
    """The device that training ran on, and name on the page -> its seconds; None where they are not of one kind."""
    devices, seconds = set[str](), dict[str, float]()
    for name, model in list_models(runs).items():
        found = sum_training([model.name], list_stage_times(model.owners[0].records))
        if found is not None:
            devices.add(found[0])
            seconds[name] = found[1][model.name]
        elif model.name == TEACHER:
            seconds[name] = 0.0
    return (devices.pop(), seconds) if len(devices) == 1 else None


def _label_model(name: str, model: str) -> str:
    return name if model in ("student", TEACHER) else f"{name}: {model}"


def _subtract_scores(first: EvaluatedRun, other: EvaluatedRun) -> list[PairedDifference]:
    """First less other in every figure of both, on the prompts that have a score of both."""
    ours, theirs = (run.scores[run.student.name] for run in (first, other))
    shared, differences = find_shared(first, other), []
    for figure in ours:
        pairs = [
            (ours[figure][place], theirs[figure][there])
            for place, there in shared.items()
            if place in ours[figure] and there in theirs.get(figure, {})
        ]
        if pairs and is_same_metric(first, other, figure):
            (interval,) = bootstrap_differences(np.array(pairs).T, first.card.intervals.seed)
            differences.append(build_difference(figure, first.run, other.run, interval, n=len(pairs)))
    return differences


def find_shared(first: EvaluatedRun, other: EvaluatedRun) -> dict[int, int]:
    """The prompts of both runs, known by their text: place in the first -> place in the other."""
    if first.prompts == other.prompts:
        return {place: place for place in range(len(first.prompts))}
    there = {prompt.text: place for place, prompt in reversed(list(enumerate(other.prompts)))}
    return {place: there[prompt.text] for place, prompt in enumerate(first.prompts) if prompt.text in there}


def is_same_metric(a: EvaluatedRun, b: EvaluatedRun, figure: str) -> bool:
    """Whether a figure is the same metric in both runs, as far as both describe it."""
    ours, theirs = (run.card.about.get(figure) for run in (a, b))
    return ours is None or theirs is None or ours == theirs


def _merge_descriptions(runs: list[EvaluatedRun]) -> dict[str, MetricFacts]:
    """What each figure is; where the runs do not agree, once for each run."""
    merged: dict[str, MetricFacts] = {}
    for figure in dict.fromkeys(figure for run in runs for figure in run.card.about):
        by_run = {run.run: run.card.about[figure] for run in runs if figure in run.card.about}
        facts = next(iter(by_run.values()))
        if all(other == facts for other in by_run.values()):
            merged[figure] = facts
        else:
            merged |= {f"{figure} in {run}": own for run, own in by_run.items()}
    return merged
