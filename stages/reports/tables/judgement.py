"""What the runs of a table say of the paper's claims: holds, does not hold, or undecided at this size.

A claim is judged by the difference of two rows, seed by seed and prompt by prompt: both met the same prompts from the
same noise. Its interval is `dmdr.metrics.intervals.student_t_interval`, which speaks for other seeds and other prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmdr.metrics.intervals import Interval, student_t_interval
from stages.reports.tables.results import Found
from stages.reports.tables.spec import Claim, Row, Spec, Variant, paper_numbers

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided at this size", "no result yet"


@dataclass(frozen=True)
class Judgement:
    """One claim on one figure. difference: higher less lower; means: of the two; None where nothing is there yet."""

    claim: Claim
    labels: tuple[str, str]  # of the two rows
    figure: str
    variant: Variant | None
    word: str
    difference: Interval | None
    means: tuple[float, float] | None
    seeds: int
    prompts: int
    trained_on: bool
    paper: dict[str, float]  # column -> the paper's own difference


def select_row(found: list[Found], row: str, variant: Variant | None) -> dict[int, Found]:
    """The finished runs of a row by seed."""
    return {each.run.seed: each for each in found if (each.run.row.name, each.run.variant) == (row, variant)}


def mean_over_seeds(found: list[Found], row: str, variant: Variant | None, figure: str) -> Interval | None:
    """A row's figure over all its seeds and prompts; None where no run is finished."""
    runs = select_row(found, row, variant)
    return student_t_interval(np.stack([each.scores[figure] for each in runs.values()])) if runs else None


def judge_claims(spec: Spec, found: list[Found]) -> list[Judgement]:
    """Every claim on every figure and variant that it is about, in their order."""
    variants = spec.variants or (None,)
    return [
        judge_claim(spec, found, claim, figure, v)
        for claim in spec.claims
        for v in variants
        for figure in claim.figures
    ]


def judge_claim(spec: Spec, found: list[Found], claim: Claim, figure: str, variant: Variant | None) -> Judgement:
    higher, lower = (select_row(found, row, variant) for row in (claim.higher, claim.lower))
    seeds = [seed for seed in higher if seed in lower]
    rows = {row.name: row for row in spec.rows}
    paper = _paper_numbers(rows[claim.higher], rows[claim.lower], variant, claim)
    labels = rows[claim.higher].label, rows[claim.lower].label
    if not seeds:
        return Judgement(claim, labels, figure, variant, NOT_RUN, None, None, 0, 0, False, paper)
    a_SP, b_SP = (np.stack([_collect_values(side[seed], claim, figure) for seed in seeds]) for side in (higher, lower))
    difference, means = student_t_interval(a_SP - b_SP), (float(a_SP.mean()), float(b_SP.mean()))
    return Judgement(
        claim,
        labels,
        figure,
        variant,
        describe_difference(difference),
        difference,
        means,
        len(seeds),
        a_SP.shape[1] if claim.of == "scores" else 0,
        any(figure in side[seed].trained_on for side in (higher, lower) for seed in seeds),
        paper,
    )


def describe_difference(difference: Interval) -> str:
    """What a 95 % interval allows to say of "the difference is above 0"; NaN decides nothing."""
    return HOLDS if difference.low > 0 else FAILS if difference.high < 0 else UNDECIDED


def _collect_values(found: Found, claim: Claim, figure: str) -> np.ndarray:
    """(prompts,); of a curve (1,), its mean over the updates."""
    if claim.of == "scores":
        return found.scores[figure]
    values = [np.nan if y is None else y for _, y in found.curves.get(figure, [])]
    return np.array([np.mean(values) if values else np.nan])


def _paper_numbers(higher: Row, lower: Row, variant: Variant | None, claim: Claim) -> dict[str, float]:
    ours, theirs = paper_numbers(higher, variant), paper_numbers(lower, variant)
    return {column: ours[column] - theirs[column] for column in claim.paper if column in ours and column in theirs}
