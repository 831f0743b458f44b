"""What a reader has to know before comparing runs, in plain sentences."""

from __future__ import annotations

from stages.reports.comparison.merged import (
    TEACHER,
    have_same_prompts,
    is_same_metric,
    join_names,
    list_models,
    list_trained_on,
)
from stages.reports.comparison.results import EvaluatedRun


def list_remarks(runs: list[EvaluatedRun]) -> list[str]:
    """What the runs do not have in common, which of them trained on a metric, and whose teacher is which."""
    first = runs[0]
    remarks = [remark for other in runs[1:] for remark in _compare_prompts(first, other)]
    for figure in sorted(set().union(*map(list_trained_on, runs))):
        trained = join_names(run.run for run in runs if figure in list_trained_on(run))
        remarks.append(f"{figure} was trained on by {trained}.")
    for figure in first.card.about:
        others = [run.run for run in runs if not is_same_metric(first, run, figure)]
        if others:
            remarks.append(
                f"{figure} of {first.run} is another metric than in {join_names(others)}: no paired differences of it."
            )
    return [*remarks, *_name_teachers(runs)]


def _compare_prompts(first: EvaluatedRun, other: EvaluatedRun) -> list[str]:
    """At most one remark: on prompts, on the number of images, or on noise that differs."""
    if first.prompts != other.prompts:
        shared = len({prompt.text for prompt in first.prompts} & {prompt.text for prompt in other.prompts})
        return [
            f"{first.run} and {other.run} were judged on other prompts ({len(first.prompts):,} and "
            f"{len(other.prompts):,}, {shared:,} in common): no paired differences, and their means do not compare."
        ]
    if not have_same_prompts(first, other):
        return [
            f"{first.run} has {first.card.images_per_prompt} images of a prompt and {other.run} "
            f"{other.card.images_per_prompt}: no paired differences."
        ]
    if first.card.intervals.seed != other.card.intervals.seed:
        return [f"{first.run} and {other.run} drew from other noise: the pairs share their prompts only."]
    return []


def _name_teachers(runs: list[EvaluatedRun]) -> list[str]:
    """Which runs each teacher belongs to, where there are several teachers."""
    teachers = {name: model.owners for name, model in list_models(runs).items() if model.name == TEACHER}
    if len(teachers) < 2:
        return []
    return [f"{name} is that of {join_names(owner.run for owner in owners)}." for name, owners in teachers.items()]
