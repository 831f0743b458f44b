"""Training curves as inline SVG: one small chart a column of metrics.jsonl, all stages on one axis of updates."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

POINTS = 160  # a curve; more updates than this are averaged in equal runs
WIDTH, HEIGHT = 300, 130  # of the plot, in SVG units
LEFT, TOP, BOTTOM = 62, 8, 22  # room for the labels
WATCH = "watch/"  # the figures of the hacking alarm
FIRST = ("loss_dm", "loss_fake", "loss_rl", "reward", WATCH)  # how columns begin, in this order; then the rest by name

Point = tuple[float, float | None]  # (student update, mean of the run of updates; None: one of them was not a number)


def read_columns(path: Path) -> dict[str, list[Point]]:
    """Numeric columns of a metrics.jsonl: column -> [(updates done, value)], in the order of the file.

    A number that is not finite becomes None, and so does null, which is how strict JSON writes one.
    """
    columns: dict[str, list[Point]] = {}
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            for name, value in row.items():
                if name != "update" and (value is None or type(value) in (int, float)):
                    finite = value is not None and math.isfinite(value)
                    done = row["update"] + (not name.startswith(WATCH))  # a look comes before the update of its row
                    columns.setdefault(name, []).append((done, value if finite else None))
    return columns


def render_charts(stages: dict[str, dict[str, list[Point]]]) -> str:
    """All columns of all stages as HTML figures; stages: name -> columns, in data order, laid end to end."""
    names = {column for columns in stages.values() for column in columns}
    lengths = {stage: max((p[0] for c in columns.values() for p in c), default=0) for stage, columns in stages.items()}
    figures = []
    for name in sorted(names, key=_order):
        start, curves = 0.0, []
        for stage, columns in stages.items():
            curves.append((stage, start, thin([(start + x, y) for x, y in columns.get(name, [])])))
            start += lengths[stage]
        figures.append(render_chart(name, curves, start))
    return f'<div class="charts">{"".join(figures)}</div>'


def _order(column: str) -> tuple[int, str]:
    return next((n for n, beginning in enumerate(FIRST) if column.startswith(beginning)), len(FIRST)), column


def thin(points: list[Point]) -> list[Point]:
    """At most POINTS points: means of equal runs, at the run's last update; a run with a broken value is broken."""
    size = math.ceil(len(points) / POINTS) or 1
    thinned: list[Point] = []
    for at in range(0, len(points), size):
        run = points[at : at + size]
        values = [y for _, y in run if y is not None]
        thinned.append((run[-1][0], math.fsum(values) / len(run) if len(values) == len(run) else None))
    return thinned


def render_chart(
    name: str, curves: list[tuple[str, float, list[Point]]], end: float, *, colours: list[int] | None = None
) -> str:
    """One column. curves: (stage, update it starts at, points); end: the last update of all.

    colours: of the curves, where some share one; None gives each its own.
    """
    values = [y for _, _, points in curves for _, y in points if y is not None]
    broken = sum(y is None for _, _, points in curves for _, y in points)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:  # a constant is drawn in the middle
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def at(x: float, y: float) -> str:
        return f"{LEFT + WIDTH * x / (end or 1):.1f},{TOP + HEIGHT * (high - y) / (high - low):.1f}"

    parts = [f'<rect class="plot" x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/>']
    for number, (_, start, points) in zip(colours or range(len(curves)), curves, strict=True):
        if start:
            parts.append(f'<path class="border" d="M{at(start, low)}L{at(start, high)}"/>')
        for run in split_at_gaps(points):
            line = "L".join(at(x, y) for x, y in run)
            dot = f'<circle class="dot{number}" r="2" cx="{line.split(",")[0]}" cy="{line.split(",")[1]}"/>'
            parts.append(f'<path class="curve{number}" d="M{line}"/>' if len(run) > 1 else dot)
        for x, y in points:
            if y is None:
                parts.append(f'<path class="broken" d="M{at(x, low)}L{at(x, high)}"><title>not a number</title></path>')
    for y, where in ((high, TOP + 10), (low, TOP + HEIGHT)):
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{where}" text-anchor="end">{y:.3g}</text>')
    for x, anchor in ((0.0, "start"), (end, "end")):
        place = LEFT + (WIDTH if anchor == "end" else 0)
        parts.append(f'<text class="tick" x="{place}" y="{TOP + HEIGHT + 16}" text-anchor="{anchor}">{x:g}</text>')
    warning = f' <b class="bad">not a number at {broken} of its points</b>' if broken else ""
    last = f"<span>last {values[-1]:.4g}</span>" if values and colours is None else ""
    return (
        f"<figure><figcaption><b>{escape(name)}</b>{warning}{last}</figcaption>"
        f'<svg viewBox="0 0 {LEFT + WIDTH + 6} {TOP + HEIGHT + BOTTOM}" role="img" aria-label="{escape(name)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def split_at_gaps(points: list[Point]) -> list[list[tuple[float, float]]]:
    """The stretches of points without a broken one in between."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((x, y))
    return [stretch for stretch in stretches if stretch]
