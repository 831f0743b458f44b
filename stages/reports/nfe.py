"""Quality against NFE as inline SVG: a small plot a metric, a point a model with its 95 % interval."""

from __future__ import annotations

import math
from html import escape

from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard
from stages.reports.style import COLOURS
from stages.reports.table1 import figure_name, list_figures
from stages.reports.verdict import format_number

WIDTH, HEIGHT = 270, 160  # of the plot, in SVG units
LEFT, TOP, BOTTOM, RIGHT = 54, 8, 38, 10
INSET = 26  # from the plot's sides to the first and the last NFE
APART = 10  # between models of the same NFE
SHAPES = (  # around (0, 0); a model is known by its shape as well as by its colour
    "M-4.5,0A4.5,4.5,0,1,0,4.5,0A4.5,4.5,0,1,0,-4.5,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.5L5.2,4H-5.2Z",
    "M0,-6L6,0L0,6L-6,0Z",
    "M0,5.5L5.2,-4H-5.2Z",
    "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
)


def render_plots(card: Figures) -> str:
    """The key, then all plots."""
    items = "".join(
        f'<li><svg viewBox="-8 -8 16 16" aria-hidden="true">{_render_marker(n, 0, 0)}</svg>'
        f"{escape(model.label)}, {model.nfe} NFE</li>"
        for n, model in enumerate(card.models)
    )
    figures = "".join(render_plot(card, figure) for figure in list_figures(card))
    return f'<ul class="key">{items}</ul><div class="charts">{figures}</div>'


def render_plot(card: Figures, figure: str) -> str:
    """One metric; NFE on a logarithmic axis. A mean that is not a number is said, not drawn."""
    rows = {each.model: each for each in card.metrics if each.name == figure}
    judged = [(n, model, rows[model.name]) for n, model in enumerate(card.models) if model.name in rows]
    drawn = [(n, model, row) for n, model, row in judged if row.mean is not None]
    broken = [model.label for _, model, row in judged if row.mean is None]
    ends = [end for _, _, row in drawn for end in (row.low, row.high)] or [0.0, 1.0]
    low, high = _pad_range(min(ends), max(ends))
    nfes = sorted({model.nfe for _, model, _ in drawn}) or [1]

    def x(nfe: int) -> float:
        if nfes[0] == nfes[-1]:
            return LEFT + WIDTH / 2
        return LEFT + INSET + (WIDTH - 2 * INSET) * math.log(nfe / nfes[0]) / math.log(nfes[-1] / nfes[0])

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    parts = [
        f'<rect class="plot" x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/>',
        *_render_axes(nfes, x, low, high),
    ]
    for n, model, row in drawn:
        same = [each for each, other, _ in drawn if other.nfe == model.nfe]
        at = x(model.nfe) + APART * (same.index(n) - (len(same) - 1) / 2)
        colour = n % len(COLOURS)
        parts.append(f'<path class="curve{colour}" d="M{at:.1f},{y(row.low):.1f}V{y(row.high):.1f}"/>')
        parts.append(_render_marker(n, at, y(row.mean), _describe_point(model, row)))
    warning = f'<b class="bad">not a number: {escape(", ".join(broken))}</b>' if broken else ""
    label = "; ".join([f"{figure} against NFE", *(_describe_point(model, row) for _, model, row in drawn)])
    return (
        f"<figure><figcaption><b>{figure_name(card, figure)}</b>{warning}</figcaption>"
        f'<svg viewBox="0 0 {LEFT + WIDTH + RIGHT} {TOP + HEIGHT + BOTTOM}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg></figure>'
    )


def _describe_point(model: ModelOnCard, row: MetricRow) -> str:
    ends = f"{format_number(row.low)} to {format_number(row.high)}"
    return f"{model.label}, {model.nfe} NFE: {format_number(row.mean)}, {ends}"


def _pad_range(low: float, high: float) -> tuple[float, float]:
    room = 0.1 * (high - low) or 0.1 * (abs(high) or 1.0)
    return low - room, high + room


def _render_marker(n: int, x: float, y: float, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    path = SHAPES[n % len(SHAPES)]
    return f'<path class="dot{n % len(COLOURS)}" transform="translate({x:.1f},{y:.1f})" d="{path}">{told}</path>'


def _render_axes(nfes: list[int], x, low: float, high: float) -> list[str]:
    """Guides with their numbers, as many decimals as the range needs; an NFE that would touch the one before is left
    out."""
    decimals = max(0, 1 - math.floor(math.log10(high - low)))
    form = f".{decimals}f" if decimals <= 4 and max(-low, high) < 1e5 else ".1e"
    parts = []
    for share in (0.1, 0.5, 0.9):
        at, value = TOP + HEIGHT * (1 - share), low + share * (high - low)
        parts.append(f'<path class="guide" d="M{LEFT},{at:.1f}H{LEFT + WIDTH}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:{form}}</text>')
    last = -math.inf
    for nfe in nfes:
        if x(nfe) - last >= 22:
            last = x(nfe)
            parts.append(f'<text class="tick" x="{last:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{nfe}</text>')
    middle = LEFT + WIDTH / 2
    parts.append(f'<text class="tick" x="{middle}" y="{TOP + HEIGHT + 32}" text-anchor="middle">NFE, log scale</text>')
    return parts
