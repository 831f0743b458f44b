"""Training curves: one small chart for each column of metrics.jsonl, with all stages on one axis of updates.

Here the places are computed; templates/charts.html.jinja draws them as SVG.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

POINTS = 160  # of a curve; more updates than this are averaged in groups of equal size
WATCH = "watch/"  # the figures of the watch
FIRST = (
    "loss_dm",
    "loss_fake",
    "loss_teacher",
    "loss_rl",
    "reward",
    WATCH,
)  # columns that begin so come first, in this order


class Point(NamedTuple):
    """A point of a curve: student updates done, and a value, or None where it is not a number."""

    update: float
    value: float | None


@dataclass(frozen=True)
class Curve:
    """One curve. points: updates counted from `start`, the update at which its stage begins; colour: by its number."""

    points: Sequence[Point]
    colour: int
    start: float = 0.0


@dataclass(frozen=True)
class Frame:
    """The plot inside its SVG, in SVG units: where it begins, its size, and room below and to the right of it."""

    left: int
    top: int
    width: int
    height: int
    below: int
    right: int

    @property
    def view_box(self) -> str:
        return f"0 0 {self.left + self.width + self.right} {self.top + self.height + self.below}"


@dataclass(frozen=True)
class Label:
    """A short text in an SVG; anchor: which of its ends, or its middle, lies at (x, y)."""

    x: str
    y: str
    anchor: str
    text: str


@dataclass(frozen=True)
class DrawnCurve:
    """A curve as path data. border: where its stage begins; lines: its unbroken stretches; breaks: where it has none.

    dots: stretches of a single point, as (x, y).
    """

    colour: int
    border: str | None
    lines: tuple[str, ...]
    dots: tuple[tuple[str, str], ...]
    breaks: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """One column, ready to be drawn. broken: number of points that are not a number; last: the last value, as text."""

    name: str
    frame: Frame
    curves: tuple[DrawnCurve, ...]
    labels: tuple[Label, ...]
    broken: int
    last: str | None


FRAME = Frame(left=62, top=8, width=300, height=130, below=22, right=6)


def read_columns(path: Path) -> dict[str, list[Point]]:
    """Read the numeric columns of a metrics.jsonl: column -> points, in the order of the file."""
    with path.open(encoding="utf-8") as file:
        return collect_columns([json.loads(line) for line in file])


def collect_columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[Point]]:
    """The numeric columns of metrics rows: column -> points, in their order.

    A number that is not finite becomes None, and so does null, which is how strict JSON writes one. The updates of the
    fake score alone, whose numbers are below 0, come first: all points are counted from the first of them.
    """
    columns: dict[str, list[Point]] = {}
    before = -min((row["update"] or 0 for row in rows), default=0)
    for row in rows:
        update = row["update"] or 0
        for name, value in row.items():
            if name != "update" and (value is None or type(value) in (int, float)):
                finite = value is not None and math.isfinite(value)
                # The watch's figures are of the student before the update of their row.
                updates_done = before + (update if name.startswith(WATCH) else update + 1)
                columns.setdefault(name, []).append(Point(updates_done, value if finite else None))
    return columns


def build_charts(stages: Mapping[str, Mapping[str, Sequence[Point]]]) -> list[Chart]:
    """A chart for each column of any stage. stages: name -> columns, in data order; they are laid end to end."""
    names = {column for columns in stages.values() for column in columns}
    charts = []
    for name in sorted(names, key=_order_column):
        start, curves = 0.0, []
        for number, columns in enumerate(stages.values()):
            curves.append(Curve(thin(columns.get(name, [])), colour=number, start=start))
            start += max((point.update for points in columns.values() for point in points), default=0)
        charts.append(build_chart(name, curves, end=start, shows_last=True))
    return charts


def _order_column(column: str) -> tuple[int, str]:
    return next((n for n, beginning in enumerate(FIRST) if column.startswith(beginning)), len(FIRST)), column


def thin(points: Sequence[Point]) -> list[Point]:
    """At most POINTS points: means of groups of equal size, each at its last update.

    A group with a value that is not a number has no mean.
    """
    size = math.ceil(len(points) / POINTS) or 1
    thinned: list[Point] = []
    for begin in range(0, len(points), size):
        group = points[begin : begin + size]
        values = [point.value for point in group if point.value is not None]
        mean = math.fsum(values) / len(group) if len(values) == len(group) else None
        thinned.append(Point(group[-1].update, mean))
    return thinned


def build_chart(name: str, curves: Sequence[Curve], *, end: float, shows_last: bool) -> Chart:
    """Lay out one column. end: the last update of all curves; shows_last: print the last value beside the name."""
    all_values = [point.value for curve in curves for point in curve.points]
    values = [value for value in all_values if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:  # a constant is drawn in the middle
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def place(x: float, y: float) -> tuple[str, str]:
        across, down = FRAME.width * x / (end or 1), FRAME.height * (high - y) / (high - low)
        return f"{FRAME.left + across:.1f}", f"{FRAME.top + down:.1f}"

    def draw_path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(",".join(place(x, y)) for x, y in points)

    drawn = []
    for curve in curves:
        points = [Point(curve.start + point.update, point.value) for point in curve.points]
        stretches = split_at_gaps(points)
        gaps = [point.update for point in points if point.value is None]
        drawn.append(
            DrawnCurve(
                curve.colour,
                border=draw_path([(curve.start, low), (curve.start, high)]) if curve.start else None,
                lines=tuple(draw_path(stretch) for stretch in stretches if len(stretch) > 1),
                dots=tuple(place(*stretch[0]) for stretch in stretches if len(stretch) == 1),
                breaks=tuple(draw_path([(x, low), (x, high)]) for x in gaps),
            )
        )
    last = f"{values[-1]:.4g}" if values and shows_last else None
    return Chart(name, FRAME, tuple(drawn), _label_axes(low, high, end), len(all_values) - len(values), last)


def _label_axes(low: float, high: float, end: float) -> tuple[Label, ...]:
    """The least and the greatest value beside the plot, the first and the last update below it."""
    left, bottom = FRAME.left, FRAME.top + FRAME.height
    return (
        Label(f"{left - 5}", f"{FRAME.top + 10}", "end", f"{high:.3g}"),
        Label(f"{left - 5}", f"{bottom}", "end", f"{low:.3g}"),
        Label(f"{left}", f"{bottom + 16}", "start", "0"),
        Label(f"{left + FRAME.width}", f"{bottom + 16}", "end", f"{end:g}"),
    )


def split_at_gaps(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The stretches of (update, value) between the points that are not a number."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((x, y))
    return [stretch for stretch in stretches if stretch]
