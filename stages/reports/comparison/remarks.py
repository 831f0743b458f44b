"""What a reader has to know before comparing runs, in plain sentences."""

from __future__ import annotations

from stages.reports.comparison.merged import (
    TEACHER,
    find_shared,
    is_same_metric,
    list_models,
    list_trained_on,
)
from stages.reports.comparison.results import EvaluatedRun
from stages.reports.numbers import format_count
from stages.reports.sentences import join_names


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
    """What the pairs of two runs do not have in common: prompts, the number of images, the noise."""
    shared, names = find_shared(first, other), f"{first.run} and {other.run}"
    if not shared:
        return [f"{names} have no prompt in common: no paired differences, and their means do not compare."]
    remarks = []
    if first.prompts != other.prompts:
        used = format_count(len(shared), "prompt")
        remarks.append(
            f"{names} were judged on different prompts ({len(first.prompts):,} and {len(other.prompts):,}): their "
            f"differences are of the {used} that both have; their means are of all, and do not compare."
        )
    if first.card.images_per_prompt != other.card.images_per_prompt:
        remarks.append(
            f"{first.run} has {format_count(first.card.images_per_prompt, 'image')} of a prompt and {other.run} "
            f"{other.card.images_per_prompt}: a pair is of their means."
        )
    if first.card.intervals.seed != other.card.intervals.seed or any(
        first.prompts[place].index != other.prompts[there].index for place, there in shared.items()
    ):
        remarks.append(f"{names} drew from other noise: the pairs share their prompts only.")
    return remarks


def _name_teachers(runs: list[EvaluatedRun]) -> list[str]:
    """Which runs each teacher belongs to, where there are several teachers."""
    teachers = {name: model.owners for name, model in list_models(runs).items() if model.name == TEACHER}
    if len(teachers) < 2:
        return []
    return [f"{name} is that of {join_names(owner.run for owner in owners)}." for name, owners in teachers.items()]
