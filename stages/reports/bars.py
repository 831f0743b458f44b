"""Bars a category, of GenEval's tasks and DPG's categories, with the number beside each."""

from __future__ import annotations

from html import escape

from dmdr.metrics.scorecard import Figures
from stages.reports.html import format_count, format_figure
from stages.reports.paper import find_tasks, sort_tasks
from stages.reports.style import COLOURS
from stages.reports.table1 import figure_name
from stages.reports.verdict import deciding_metric

DPG = "dpg-bench"
BENCHMARKS = ("geneval", DPG)  # how the figures begin that are open at once, besides the deciding one


def render_categories(card: Figures, base: str | None) -> str:
    """A part a figure that has categories. base: the teacher as the paper calls it, whose numbers stand beside ours."""
    parts = []
    for figure in card.tags:
        printed = find_tasks(base, figure, list(card.tags), card.about)
        is_open = ' open=""' if figure == deciding_metric(card) or figure.startswith(BENCHMARKS) else ""
        note = (
            f'<p class="faint"><small>Outlined: as printed in the paper for {escape(base or "")}.</small></p>'
            if printed
            else ""
        )
        summary = f"<summary>{figure_name(card, figure)}</summary>"
        parts.append(f"<details{is_open}>{summary}{note}{_render_blocks(card, figure, printed)}</details>")
    return "".join(parts)


def _render_blocks(card: Figures, figure: str, printed: dict[str, dict[str, float]]) -> str:
    by_model = card.tags[figure]
    models = [(n, model) for n, model in enumerate(card.models) if model.name in by_model]
    tags = {tag: row for each in by_model.values() for tag, row in each.tags.items()}
    values = [row.mean for each in by_model.values() for row in each.tags.values() if row.mean is not None]
    values += [value for numbers in printed.values() for value in numbers.values()]
    full = 1.0 if max(values, default=0) <= 1 else 100.0 if max(values) > 50 and max(values) <= 100 else max(values)
    has_bars = min(values, default=0) >= 0  # a bar has to start at 0
    blocks = []
    for name in ["overall", *sort_tasks(list(tags))]:
        rows = []
        for n, model in models:
            found = by_model[model.name]
            if name != "overall" and name not in found.tags:  # of a run that met other prompts
                continue
            value = found.overall if name == "overall" else found.tags[name].mean
            rows.append(_render_bar(model.label, value, full if has_bars else None, f"k{n % len(COLOURS)}"))
        for label, numbers in printed.items():
            if name in numbers:
                rows.append(
                    _render_bar(f"paper: {label}", numbers[name], full if has_bars else None, "", " class='reference'")
                )
        over = "mean over the prompts" if figure.startswith(DPG) else "mean of the categories"
        told = over if name == "overall" else format_count(tags[name].n, "prompt")
        caption = f"<caption>{escape(name)} <small>{told}</small></caption>"
        blocks.append(f'<table class="bars">{caption}<tbody>{"".join(rows)}</tbody></table>')
    return f'<div class="blocks">{"".join(blocks)}</div>'


def _render_bar(label: str, value: float | None, full: float | None, kind: str, row: str = "") -> str:
    """One row. full: what a whole bar means; None draws none."""
    drawn = value is not None and full
    bar = f'<i class="{kind}" style="width:{100 * value / full:.1f}%"></i>' if drawn else ""
    return f'<tr{row}><th scope="row">{escape(label)}</th><td>{bar}</td><td>{format_figure(value)}</td></tr>'
