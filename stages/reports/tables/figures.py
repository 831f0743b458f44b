"""The figures of a table: rows by metrics, ours first and the paper's beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmdr.metrics.intervals import Interval
from stages.reports.tables.judgement import mean_over_seeds, select_row
from stages.reports.tables.results import FinishedRun
from stages.reports.tables.spec import Column, Row, Spec, Variant, paper_numbers
from stages.reports.verdict import is_diversity


@dataclass(frozen=True)
class Score:
    """A row's mean over seeds and prompts with its 95 % interval; None where it is not a number."""

    mean: float | None
    low: float
    high: float


@dataclass(frozen=True)
class OurCell:
    """score: None where no run is finished; seeds: how many were run."""

    score: Score | None
    seeds: int
    trained_on: bool


@dataclass(frozen=True)
class Line:
    """One row. model: whose images were judged, or None: DMDR does not run this row.

    ours, paper: a group of cells for each variant; a cell of the paper's is empty where it prints nothing.
    """

    label: str
    model: str | None
    ours: tuple[tuple[OurCell, ...], ...]
    paper: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figures:
    """The whole table. our_groups, paper_groups: how the columns of each variant are headed."""

    columns: tuple[Column, ...]
    paper_columns: tuple[str, ...]
    our_groups: tuple[str, ...]
    paper_groups: tuple[str, ...]
    lines: tuple[Line, ...]
    trained_on: bool
    has_diversity: bool


def build_figures(spec: Spec, finished: list[FinishedRun]) -> Figures:
    """The table of what the finished runs measured."""
    variants = spec.all_variants
    return Figures(
        spec.columns,
        spec.paper_columns,
        our_groups=tuple(f"ours, {variant.label}" if variant else "ours" for variant in variants),
        paper_groups=tuple(
            f"the paper, {variant.paper}" if variant and variant.paper else "the paper"
            for variant in (variants if spec.paper_columns else ())
        ),
        lines=tuple(_build_line(spec, row, finished) for row in spec.rows),
        trained_on=any(column.metric in each.trained_on for column in spec.columns for each in finished),
        has_diversity=any(is_diversity(column.metric) for column in spec.columns),
    )


def _build_line(spec: Spec, row: Row, finished: list[FinishedRun]) -> Line:
    return Line(
        row.label,
        None if row.model == "none" else row.model,
        ours=tuple(
            tuple(_build_cell(finished, row, variant, column.metric) for column in spec.columns)
            for variant in spec.all_variants
        ),
        paper=tuple(_format_paper(spec, row, variant) for variant in spec.all_variants),
    )


def _build_cell(finished: list[FinishedRun], row: Row, variant: Variant | None, metric: str) -> OurCell:
    runs = select_row(finished, row.name, variant)
    interval = mean_over_seeds(finished, row.name, variant, metric)
    return OurCell(
        None if interval is None else _build_score(interval),
        len(runs),
        any(metric in each.trained_on for each in runs.values()),
    )


def _build_score(interval: Interval) -> Score:
    mean, low, high = interval
    return Score(None if math.isnan(mean) else mean, low, high)


def _format_paper(spec: Spec, row: Row, variant: Variant | None) -> tuple[str, ...]:
    numbers = paper_numbers(row, variant)
    return tuple(f"{numbers[column]:.4f}" if column in numbers else "" for column in spec.paper_columns)
