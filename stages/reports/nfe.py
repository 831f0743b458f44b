"""Quality against NFE: a small plot for each metric, with a point for each model and its 95 % interval.

Here the places are computed; templates/charts.html.jinja draws them as SVG.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures, ModelOnCard
from stages.reports.charts import Frame, Label
from stages.reports.style import COLOURS
from stages.reports.table1 import is_trained_on, list_figures
from stages.reports.verdict import format_number

FRAME = Frame(left=54, top=8, width=270, height=160, below=38, right=10)
INSET = 26  # SVG units from the plot's sides to the least and the greatest NFE
APART = 10  # SVG units between models of the same NFE
LABEL_WIDTH = 22  # SVG units that an NFE below the axis needs
SHAPES = (  # path data around (0, 0); a model is known by its shape as well as by its colour
    "M-4.5,0A4.5,4.5,0,1,0,4.5,0A4.5,4.5,0,1,0,-4.5,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.5L5.2,4H-5.2Z",
    "M0,-6L6,0L0,6L-6,0Z",
    "M0,5.5L5.2,-4H-5.2Z",
    "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
)


@dataclass(frozen=True)
class Marker:
    """A model's sign; text: which model it is, and its NFE."""

    colour: int
    shape: str
    text: str


@dataclass(frozen=True)
class PlotPoint:
    """A model's mean at (x, y), its interval as path data, and all of it in words."""

    marker: Marker
    x: str
    y: str
    interval: str
    text: str


@dataclass(frozen=True)
class Plot:
    """One metric.

    broken: labels of the models whose mean is not a number. guides: path data. text: for screen readers.
    """

    figure: str
    trained_on: bool
    broken: tuple[str, ...]
    frame: Frame
    guides: tuple[str, ...]
    labels: tuple[Label, ...]
    points: tuple[PlotPoint, ...]
    text: str


@dataclass(frozen=True)
class JudgedModel:
    """A model whose mean is a number. number: its place on the card; low, high: the ends of its 95 % interval."""

    number: int
    model: ModelOnCard
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Axes:
    """From numbers to places in the plot. nfes: of the models, sorted; low, high: the ends of the score's axis."""

    nfes: tuple[int, ...]
    low: float
    high: float

    def place_nfe(self, nfe: int) -> float:
        """On a logarithmic axis."""
        first, last = self.nfes[0], self.nfes[-1]
        if first == last:
            return FRAME.left + FRAME.width / 2
        return FRAME.left + INSET + (FRAME.width - 2 * INSET) * math.log(nfe / first) / math.log(last / first)

    def place_score(self, score: float) -> float:
        return FRAME.top + FRAME.height * (self.high - score) / (self.high - self.low)


def build_markers(card: Figures) -> list[Marker]:
    """The key of all plots."""
    return [_mark_model(number, model) for number, model in enumerate(card.models)]


def _mark_model(number: int, model: ModelOnCard) -> Marker:
    return Marker(number % len(COLOURS), SHAPES[number % len(SHAPES)], f"{model.label}, {model.nfe} NFE")


def build_plots(card: Figures) -> list[Plot]:
    """A plot for each metric."""
    return [build_plot(card, figure) for figure in list_figures(card)]


def build_plot(card: Figures, figure: str) -> Plot:
    """Plot one metric. A mean that is not a number is named, not drawn."""
    rows = {row.model: row for row in card.metrics if row.name == figure}
    judged = [(number, model, rows[model.name]) for number, model in enumerate(card.models) if model.name in rows]
    drawn = [
        JudgedModel(number, model, row.mean, row.low, row.high)
        for number, model, row in judged
        if row.mean is not None and row.low is not None and row.high is not None
    ]
    axes = _choose_axes(drawn)
    points = tuple(_place_point(each, drawn, axes) for each in drawn)
    return Plot(
        figure,
        is_trained_on(card, figure),
        broken=tuple(model.label for _, model, row in judged if row.mean is None),
        frame=FRAME,
        guides=tuple(f"M{FRAME.left},{y:.1f}H{FRAME.left + FRAME.width}" for y, _ in _list_guides(axes)),
        labels=(*_label_scores(axes), *_label_nfes(axes)),
        points=points,
        text="; ".join([f"{figure} against NFE", *(point.text for point in points)]),
    )


def _choose_axes(drawn: list[JudgedModel]) -> Axes:
    """Axes that hold all intervals, with some room above and below."""
    ends = [end for each in drawn for end in (each.low, each.high)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    room = 0.1 * (high - low) or 0.1 * (abs(high) or 1.0)
    return Axes(tuple(sorted({each.model.nfe for each in drawn})) or (1,), low - room, high + room)


def _place_point(each: JudgedModel, drawn: list[JudgedModel], axes: Axes) -> PlotPoint:
    """Models of the same NFE stand beside each other."""
    same = [other.number for other in drawn if other.model.nfe == each.model.nfe]
    x = axes.place_nfe(each.model.nfe) + APART * (same.index(each.number) - (len(same) - 1) / 2)
    low, mean, high = (axes.place_score(score) for score in (each.low, each.mean, each.high))
    marker = _mark_model(each.number, each.model)
    ends = f"{format_number(each.low)} to {format_number(each.high)}"
    return PlotPoint(
        marker,
        f"{x:.1f}",
        f"{mean:.1f}",
        interval=f"M{x:.1f},{low:.1f}V{high:.1f}",
        text=f"{marker.text}: {format_number(each.mean)}, {ends}",
    )


def _list_guides(axes: Axes) -> list[tuple[float, float]]:
    """Height in the plot and score of the lines behind the points."""
    return [
        (FRAME.top + FRAME.height * (1 - share), axes.low + share * (axes.high - axes.low)) for share in (0.1, 0.5, 0.9)
    ]


def _label_scores(axes: Axes) -> list[Label]:
    """The score of each guide, with as many decimals as the range needs."""
    decimals = max(0, 1 - math.floor(math.log10(axes.high - axes.low)))
    form = f".{decimals}f" if decimals <= 4 and max(-axes.low, axes.high) < 1e5 else ".1e"
    return [Label(f"{FRAME.left - 6}", f"{y + 4:.1f}", "end", f"{score:{form}}") for y, score in _list_guides(axes)]


def _label_nfes(axes: Axes) -> list[Label]:
    """Each NFE below the axis, but for one that would touch the one before; then what they are."""
    bottom, labels, last = FRAME.top + FRAME.height, [], -math.inf
    for nfe in axes.nfes:
        x = axes.place_nfe(nfe)
        if x - last >= LABEL_WIDTH:
            labels.append(Label(f"{x:.1f}", f"{bottom + 16}", "middle", f"{nfe}"))
            last = x
    return [*labels, Label(f"{FRAME.left + FRAME.width / 2}", f"{bottom + 32}", "middle", "NFE, log scale")]
