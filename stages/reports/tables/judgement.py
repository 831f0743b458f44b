"""What the runs of a table say about the paper's claims: holds, does not hold, or undecided at this size.

A claim is judged by the difference between two rows, seed by seed and prompt by prompt: both rows drew the same prompts
from the same noise. Its interval is `dmdr.metrics.intervals.student_t_interval`, which speaks for other seeds and other
prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dmdr.metrics.intervals import Interval, student_t_interval
from stages.reports.tables.results import FinishedRun
from stages.reports.tables.spec import Claim, Row, Spec, Variant, paper_numbers

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided at this size", "no result yet"


@dataclass(frozen=True)
class Judgement:
    """One claim on one figure.

    labels: of the row that should be higher, and of the one that should be lower. paper: column -> the difference that
    the paper prints. difference: higher less lower; means: of the two rows; both None where no seed has both rows.
    """

    claim: Claim
    labels: tuple[str, str]
    figure: str
    variant: Variant | None
    paper: dict[str, float]
    word: str = NOT_RUN
    difference: Interval | None = None
    means: tuple[float, float] | None = None
    seeds: int = 0
    prompts: int = 0
    trained_on: bool = False


def select_row(finished: list[FinishedRun], row: str, variant: Variant | None) -> dict[int, FinishedRun]:
    """The finished runs of a row, by seed."""
    return {each.run.seed: each for each in finished if (each.run.row.name, each.run.variant) == (row, variant)}


def mean_over_seeds(finished: list[FinishedRun], row: str, variant: Variant | None, figure: str) -> Interval | None:
    """A row's mean over all its seeds and prompts; None where no run is finished."""
    runs = select_row(finished, row, variant)
    return student_t_interval(np.stack([each.scores[figure] for each in runs.values()])) if runs else None


def judge_claims(spec: Spec, finished: list[FinishedRun]) -> list[Judgement]:
    """Judge every claim on each of its figures in every variant, in their order."""
    return [
        judge_claim(spec, finished, claim, figure, variant)
        for claim in spec.claims
        for variant in spec.all_variants
        for figure in claim.figures
    ]


def judge_claim(
    spec: Spec, finished: list[FinishedRun], claim: Claim, figure: str, variant: Variant | None
) -> Judgement:
    """Judge one claim on one figure, over the seeds that both rows have."""
    rows = {row.name: row for row in spec.rows}
    higher, lower = rows[claim.higher], rows[claim.lower]
    paper = _subtract_paper(higher, lower, variant, claim)
    judgement = Judgement(claim, (higher.label, lower.label), figure, variant, paper)
    higher_runs, lower_runs = (select_row(finished, row.name, variant) for row in (higher, lower))
    seeds = [seed for seed in higher_runs if seed in lower_runs]
    if not seeds:
        return judgement
    higher_SP, lower_SP = (
        np.stack([_collect_values(runs[seed], claim, figure) for seed in seeds]) for runs in (higher_runs, lower_runs)
    )
    difference = student_t_interval(higher_SP - lower_SP)
    return replace(
        judgement,
        word=describe_difference(difference),
        difference=difference,
        means=(float(higher_SP.mean()), float(lower_SP.mean())),
        seeds=len(seeds),
        prompts=higher_SP.shape[1] if claim.of == "scores" else 0,
        trained_on=any(figure in runs[seed].trained_on for runs in (higher_runs, lower_runs) for seed in seeds),
    )


def describe_difference(difference: Interval) -> str:
    """What a 95 % interval lets us say about "the difference is above 0"; NaN decides nothing."""
    if difference.low > 0:
        return HOLDS
    return FAILS if difference.high < 0 else UNDECIDED


def _collect_values(run: FinishedRun, claim: Claim, figure: str) -> np.ndarray:
    """The scores (prompts,); of a curve its mean over the updates (1,)."""
    if claim.of == "scores":
        return run.scores[figure]
    values = [np.nan if point.value is None else point.value for point in run.curves.get(figure, [])]
    return np.array([np.mean(values) if values else np.nan])


def _subtract_paper(higher: Row, lower: Row, variant: Variant | None, claim: Claim) -> dict[str, float]:
    """The difference that the paper prints, in the claim's columns that both rows have."""
    minuend, subtrahend = paper_numbers(higher, variant), paper_numbers(lower, variant)
    return {
        column: minuend[column] - subtrahend[column]
        for column in claim.paper
        if column in minuend and column in subtrahend
    }
