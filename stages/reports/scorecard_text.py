"""A scorecard as text: sentences, then Markdown tables whose columns also line up on a terminal."""

from __future__ import annotations

from dmdr.config.plain_text import to_line
from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard, PairedDifference
from stages.reports.headline import list_plain_sentences
from stages.reports.verdict import NOT_A_NUMBER, format_number


def format_scorecard(card: Figures) -> str:
    """What it shows in sentences, models against metrics, then the paired differences.

    Every interval is the 95 % one over prompts.
    """
    cells = {(row.name, row.model): _format_mean(row) for row in card.metrics}
    trained_on = {row.name: row.trained_on for row in card.metrics}
    scores = [["metric", *map(_format_heading, card.models)]]
    for metric in trained_on:
        name = f"{metric} (trained on)" if trained_on[metric] else metric
        scores.append([name, *(cells.get((metric, model.name), "") for model in card.models)])
    differences = [["difference", "metric", "mean, 95 % interval"]]
    differences += [[f"{pair.a} - {pair.b}", pair.metric, _format_difference(pair)] for pair in card.paired]
    tables = [format_table(rows) for rows in (scores, differences) if len(rows) > 1]
    return "\n\n".join([*list_plain_sentences(card), *tables])


def format_table(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, each cell on one line; the first row is the heading."""
    rows = [[to_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _format_heading(model: ModelOnCard) -> str:
    steps = "1 step" if model.steps == 1 else f"{model.steps} steps"
    guidance = f", CFG {model.guidance_scale:g}" if model.guidance_scale > 1 else ""
    return f"{model.name}: {steps}, {model.nfe} NFE{guidance}"


def _format_mean(row: MetricRow) -> str:
    if row.mean is None:
        return NOT_A_NUMBER
    return f"{format_number(row.mean)} [{format_number(row.low)}, {format_number(row.high)}]"


def _format_difference(pair: PairedDifference) -> str:
    if pair.difference is None:
        return NOT_A_NUMBER
    return f"{format_number(pair.difference, '+')} [{format_number(pair.low, '+')}, {format_number(pair.high, '+')}]"
