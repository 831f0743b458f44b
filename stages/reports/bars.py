"""Bars for each category of a benchmark, as GenEval's tasks and DPG-Bench's categories, each with its number.

templates/scorecard.html.jinja draws them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures, TagMeans
from stages.reports.numbers import format_count
from stages.reports.paper import find_tasks, sort_tasks
from stages.reports.style import COLOURS
from stages.reports.table1 import is_trained_on
from stages.reports.verdict import deciding_metric

DPG = "dpg-bench"
BENCHMARKS = ("geneval", DPG)  # figures that begin so are open at first, besides the deciding one
OVERALL = "overall"


@dataclass(frozen=True)
class Bar:
    """One bar. percent: its length, None where none is drawn; colour: its number, None for a number of the paper."""

    label: str
    value: float | None
    percent: float | None
    colour: int | None


@dataclass(frozen=True)
class Block:
    """The bars of one category; note: what its numbers are means of."""

    category: str
    note: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Categories:
    """One figure by category. paper_base: the base model whose printed numbers stand beside ours, if there are any."""

    figure: str
    trained_on: bool
    is_open: bool
    paper_base: str | None
    blocks: tuple[Block, ...]


def build_categories(card: Figures, base: str | None) -> list[Categories]:
    """Each figure that has categories. base: the teacher as the paper calls it."""
    categories = []
    for figure in card.tags:
        printed = find_tasks(base, figure, list(card.tags), card.about)
        categories.append(
            Categories(
                figure,
                is_trained_on(card, figure),
                is_open=figure == deciding_metric(card) or figure.startswith(BENCHMARKS),
                paper_base=base if printed else None,
                blocks=_build_blocks(card, figure, printed),
            )
        )
    return categories


def _build_blocks(card: Figures, figure: str, printed: dict[str, dict[str, float]]) -> tuple[Block, ...]:
    """The overall mean, then each category. printed: label -> category -> the paper's number."""
    by_model = card.tags[figure]
    prompts = {tag: mean.n for means in by_model.values() for tag, mean in means.tags.items()}
    full = _find_full_length(list(by_model.values()), printed)
    overall_note = "mean over the prompts" if figure.startswith(DPG) else "mean of the categories"
    blocks = []
    for category in [OVERALL, *sort_tasks(list(prompts))]:
        bars = [
            _build_bar(model.label, _find_mean(by_model[model.name], category), full, number % len(COLOURS))
            for number, model in enumerate(card.models)
            if model.name in by_model and _has_category(by_model[model.name], category)
        ]
        bars += [
            _build_bar(f"paper: {label}", numbers[category], full, None)
            for label, numbers in printed.items()
            if category in numbers
        ]
        note = overall_note if category == OVERALL else format_count(prompts[category], "prompt")
        blocks.append(Block(category, note, tuple(bars)))
    return tuple(blocks)


def _has_category(means: TagMeans, category: str) -> bool:
    """A run that was judged on other prompts may lack a category."""
    return category == OVERALL or category in means.tags


def _find_mean(means: TagMeans, category: str) -> float | None:
    return means.overall if category == OVERALL else means.tags[category].mean


def _find_full_length(all_means: list[TagMeans], printed: dict[str, dict[str, float]]) -> float | None:
    """The value that a whole bar stands for; None draws no bars, for a bar has to start at 0."""
    means = [mean.mean for means in all_means for mean in means.tags.values()]
    values = [mean for mean in means if mean is not None]
    values += [value for numbers in printed.values() for value in numbers.values()]
    greatest = max(values, default=0.0)
    if min(values, default=0.0) < 0:
        return None
    if greatest <= 1:
        return 1.0
    return 100.0 if 50 < greatest <= 100 else greatest


def _build_bar(label: str, value: float | None, full: float | None, colour: int | None) -> Bar:
    return Bar(label, value, None if value is None or full is None else 100 * value / full, colour)
