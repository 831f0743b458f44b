"""Several scorecards as one, whose models are the runs' students and their teachers, each teacher once.

The first run is compared with each of the others, prompt by prompt, where both were judged on the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    TagMeans,
)
from stages.reports.comparison.results import Evaluated

TEACHER = "teacher"


def list_models(runs: list[Evaluated]) -> dict[str, tuple[list[Evaluated], str]]:
    """Name on the page -> the runs that have it and what it is called there: the students first, then the teachers."""
    found = {each.run: ([each], each.student.name) for each in runs}
    teachers: dict[tuple, list[Evaluated]] = {}
    for each in runs:
        if each.student.name != TEACHER and _teacher(each):
            teachers.setdefault(_teacher_key(each), []).append(each)
    for number, of_teacher in enumerate(teachers.values(), start=1):
        found[TEACHER if len(teachers) == 1 else f"{TEACHER} {number}"] = (of_teacher, TEACHER)
    return found


def _teacher(run: Evaluated) -> ModelOnCard | None:
    return next((model for model in run.card.models if model.name == TEACHER), None)


def _teacher_key(run: Evaluated) -> tuple:
    """Teachers that agree in it drew the same images."""
    model = _teacher(run)
    return (
        run.records["evaluate"].inputs["teacher"],
        model.steps,
        model.guidance_scale,
        tuple(run.prompts),
        run.card.intervals.seed,
        run.card.images_per_prompt,
    )


def trained_on(run: Evaluated) -> set[str]:
    return {each.name for each in run.card.metrics if each.trained_on}


def have_same_prompts(a: Evaluated, b: Evaluated) -> bool:
    """Whether both were judged on the same prompts with as many images of each."""
    return a.prompts == b.prompts and a.card.images_per_prompt == b.card.images_per_prompt


def merge_scorecards(runs: list[Evaluated]) -> Figures:
    """The figures of all runs. A figure that one of the runs trained on is marked for all of them: it cannot decide."""
    compared = list_models(runs)
    tainted = set().union(*map(trained_on, runs))
    models: dict[str, ModelOnCard] = {}
    rows: dict[tuple[str, str], MetricRow] = {}
    tags: dict[str, dict[str, TagMeans]] = {}
    for name, (owners, model) in compared.items():
        for card in (each.card for each in reversed(owners)):  # so that of a shared teacher the first run's stay
            (head,) = [each for each in card.models if each.name == model]
            models[name] = head.model_copy(update={"name": name, "label": _label(name, model)})
            for row in card.metrics:
                if row.model == model:
                    rows[row.name, name] = row.model_copy(update={"model": name, "trained_on": row.name in tainted})
            for figure, by_model in card.tags.items():
                if model in by_model:
                    tags.setdefault(figure, {})[name] = by_model[model]
    first = runs[0]
    return Figures(
        models=tuple(models.values()),
        metrics=tuple(rows.values()),
        paired=tuple(
            pair for other in runs[1:] if have_same_prompts(first, other) for pair in _build_pairs(first, other)
        ),
        tags=tags,
        missing=tuple(
            MissingMetric(metric=f"{each.metric} in {run.run}", why=each.why)
            for run in runs
            for each in run.card.missing
        ),
        about=_merge_descriptions(runs),
    )


def list_seconds(runs: list[Evaluated]) -> dict[str, float | None]:
    """Seconds per image of each model on the page; of a shared teacher, those of the first run that has it."""
    return {name: owners[0].speed.seconds_per_image[model] for name, (owners, model) in list_models(runs).items()}


def _label(name: str, model: str) -> str:
    return name if model in ("student", TEACHER) else f"{name}: {model}"


def _build_pairs(first: Evaluated, other: Evaluated) -> list[PairedDifference]:
    """First less other on the prompts that both have a score of, every figure of both."""
    ours, theirs = (each.scores[each.student.name] for each in (first, other))
    found = []
    for figure in ours:
        places = sorted(ours[figure].keys() & theirs.get(figure, {}).keys())
        if not places or not _same_metric(first, other, figure):
            continue
        scores_MP = np.array([[side[figure][place] for place in places] for side in (ours, theirs)])
        (interval,) = bootstrap_differences(scores_MP, first.card.intervals.seed)
        found.append(build_difference(figure, first.run, other.run, interval))
    return found


def _same_metric(a: Evaluated, b: Evaluated, figure: str) -> bool:
    """Whether two runs mean the same by a figure, as far as both say what it is."""
    ours, theirs = (each.card.about.get(figure) for each in (a, b))
    return ours is None or theirs is None or ours == theirs


def _merge_descriptions(runs: list[Evaluated]) -> dict[str, MetricFacts]:
    """What each figure is; where runs do not agree, each run's own."""
    found: dict[str, MetricFacts] = {}
    for figure in dict.fromkeys(figure for run in runs for figure in run.card.about):
        told = {run.run: run.card.about[figure] for run in runs if figure in run.card.about}
        facts = list(told.values())
        agreed = all(each == facts[0] for each in facts)
        found |= {figure: facts[0]} if agreed else {f"{figure} in {run}": each for run, each in told.items()}
    return found


def list_remarks(runs: list[Evaluated]) -> list[str]:
    """What a reader has to know before comparing, in plain sentences."""
    first, told = runs[0], []
    for other in runs[1:]:
        if first.prompts != other.prompts:
            shared = len({text for _, text in first.prompts} & {text for _, text in other.prompts})
            told.append(
                f"{first.run} and {other.run} were judged on other prompts ({len(first.prompts):,} and "
                f"{len(other.prompts):,}, {shared:,} in common): no paired differences, and their means do not compare."
            )
        elif not have_same_prompts(first, other):
            told.append(
                f"{first.run} has {first.card.images_per_prompt} images of a prompt and {other.run} "
                f"{other.card.images_per_prompt}: no paired differences."
            )
        elif first.card.intervals.seed != other.card.intervals.seed:
            told.append(f"{first.run} and {other.run} drew from other noise: the pairs share their prompts only.")
    for figure in sorted(set().union(*map(trained_on, runs))):
        told.append(
            f"{figure} was trained on by {join_names(each.run for each in runs if figure in trained_on(each))}."
        )
    for figure in first.card.about:
        others = [each.run for each in runs if not _same_metric(first, each, figure)]
        if others:
            told.append(
                f"{figure} of {first.run} is another metric than in {join_names(others)}: no paired differences of it."
            )
    return [*told, *(f"{name} is that of {join_names(runs)}." for name, runs in _teachers(runs).items())]


def _teachers(runs: list[Evaluated]) -> dict[str, list[str]]:
    """Whose teacher each is, where there are several."""
    found = {
        name: [each.run for each in owners] for name, (owners, model) in list_models(runs).items() if model == TEACHER
    }
    return found if len(found) > 1 else {}


def join_names(names: Iterable[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last
