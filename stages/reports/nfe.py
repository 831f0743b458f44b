"""Quality against what it costs (NFE, seconds an image, training): a small plot for each metric, with a point for each
model and its 95 % interval.

Here the places are computed; templates/charts.html.jinja draws them as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures, ModelOnCard
from stages.reports.charts import Frame, Label
from stages.reports.style import COLOURS
from stages.reports.table1 import is_trained_on, list_figures
from stages.reports.verdict import format_number

FRAME = Frame(left=54, top=8, width=270, height=160, below=38, right=10)
INSET = 26  # SVG units from the plot's sides to the least and the greatest cost
APART = 10  # SVG units between models of the same cost
DIGIT = 8  # SVG units that a digit below the axis needs
SHAPES = (  # path data around (0, 0); a model is known by its shape as well as by its colour
    "M-4.5,0A4.5,4.5,0,1,0,4.5,0A4.5,4.5,0,1,0,-4.5,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.5L5.2,4H-5.2Z",
    "M0,-6L6,0L0,6L-6,0Z",
    "M0,5.5L5.2,-4H-5.2Z",
    "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
)


@dataclass(frozen=True)
class Cost:
    """What an axis shows. name: in a sentence; caption: below the axis; values: by model, without those not known.

    measured: it is a time, which differs from run to run.
    """

    name: str
    caption: str
    values: Mapping[str, float]
    is_logarithmic: bool
    measured: bool = False


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
    measured: bool
    broken: tuple[str, ...]
    frame: Frame
    guides: tuple[str, ...]
    labels: tuple[Label, ...]
    points: tuple[PlotPoint, ...]
    text: str


@dataclass(frozen=True)
class PlotGroup:
    """The plots against one cost. name: of the cost."""

    name: str
    plots: Sequence[Plot]


@dataclass(frozen=True)
class JudgedModel:
    """A model that has a mean and a cost. number: its place on the card; low, high: the ends of its 95 % interval."""

    number: int
    model: ModelOnCard
    cost: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Axes:
    """From numbers to places in the plot. costs: of the models, sorted; low, high: the ends of the score's axis."""

    costs: tuple[float, ...]
    is_logarithmic: bool
    low: float
    high: float

    def place_cost(self, cost: float) -> float:
        first, last, room = self.costs[0], self.costs[-1], FRAME.width - 2 * INSET
        if first == last:
            return FRAME.left + FRAME.width / 2
        if self.is_logarithmic:
            return FRAME.left + INSET + room * math.log(cost / first) / math.log(last / first)
        return FRAME.left + INSET + room * (cost - first) / (last - first)

    def place_score(self, score: float) -> float:
        return FRAME.top + FRAME.height * (self.high - score) / (self.high - self.low)


def measure_nfe(card: Figures) -> Cost:
    """Forwards of the network for one image."""
    return Cost("NFE", "NFE, log scale", {model.name: model.nfe for model in card.models}, is_logarithmic=True)


def measure_seconds(seconds_per_image: Mapping[str, float | None]) -> Cost:
    """Seconds an image, of the models that were timed."""
    values = {model: seconds for model, seconds in seconds_per_image.items() if seconds}
    return Cost("seconds an image", "seconds an image, log scale", values, is_logarithmic=True, measured=True)


def measure_training(seconds: Mapping[str, float], device: str) -> Cost:
    """What training took. seconds: of a device, by model, 0 for a teacher; device: cuda or cpu."""
    kind, longest = "CPU" if device == "cpu" else "GPU", max(seconds.values(), default=0.0)
    unit, size = ("minutes", 60) if longest < 6000 else ("hours", 3600)
    name = f"{kind}-{unit} of training"
    return Cost(name, name, {model: each / size for model, each in seconds.items()}, False, measured=True)


def build_markers(card: Figures) -> list[Marker]:
    """The key of all plots."""
    return [_mark_model(number, model) for number, model in enumerate(card.models)]


def _mark_model(number: int, model: ModelOnCard) -> Marker:
    return Marker(number % len(COLOURS), SHAPES[number % len(SHAPES)], f"{model.label}, {model.nfe} NFE")


def build_plot_groups(card: Figures, costs: Sequence[Cost]) -> list[PlotGroup]:
    """Every metric against every cost that is known of two models or more."""
    return [PlotGroup(cost.name, build_plots(card, cost)) for cost in costs if len(cost.values) > 1]


def build_plots(card: Figures, cost: Cost) -> list[Plot]:
    """A plot for each metric."""
    return [build_plot(card, figure, cost) for figure in list_figures(card)]


def build_plot(card: Figures, figure: str, cost: Cost) -> Plot:
    """Plot one metric. A mean that is not a number is named, not drawn."""
    rows = {row.model: row for row in card.metrics if row.name == figure}
    judged = [(number, model, rows[model.name]) for number, model in enumerate(card.models) if model.name in rows]
    drawn = [
        JudgedModel(number, model, cost.values[model.name], row.mean, row.low, row.high)
        for number, model, row in judged
        if row.mean is not None and row.low is not None and row.high is not None and model.name in cost.values
    ]
    axes = _choose_axes(drawn, cost)
    points = tuple(_place_point(each, drawn, axes, cost) for each in drawn)
    return Plot(
        figure,
        is_trained_on(card, figure),
        cost.measured,
        broken=tuple(model.label for _, model, row in judged if row.mean is None),
        frame=FRAME,
        guides=tuple(f"M{FRAME.left},{y:.1f}H{FRAME.left + FRAME.width}" for y, _ in _list_guides(axes)),
        labels=(*_label_scores(axes), *_label_costs(axes, cost.caption)),
        points=points,
        text="; ".join([f"{figure} against {cost.name}", *(point.text for point in points)]),
    )


def _choose_axes(drawn: list[JudgedModel], cost: Cost) -> Axes:
    """Axes that hold all intervals, with some room above and below."""
    ends = [end for each in drawn for end in (each.low, each.high)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    room = 0.1 * (high - low) or 0.1 * (abs(high) or 1.0)
    costs = tuple(sorted({each.cost for each in drawn})) or (1.0,)
    return Axes(costs, cost.is_logarithmic, low - room, high + room)


def _place_point(each: JudgedModel, drawn: Sequence[JudgedModel], axes: Axes, cost: Cost) -> PlotPoint:
    """Models of the same cost stand beside each other."""
    same = [other.number for other in drawn if other.cost == each.cost]
    x = axes.place_cost(each.cost) + APART * (same.index(each.number) - (len(same) - 1) / 2)
    low, mean, high = (axes.place_score(score) for score in (each.low, each.mean, each.high))
    marker = _mark_model(each.number, each.model)
    ends = f"{format_number(each.low)} to {format_number(each.high)}"
    spent = f", {each.cost:.3g} {cost.name}" if cost.measured else ""
    return PlotPoint(
        marker,
        f"{x:.1f}",
        f"{mean:.1f}",
        interval=f"M{x:.1f},{low:.1f}V{high:.1f}",
        text=f"{marker.text}{spent}: {format_number(each.mean)}, {ends}",
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


def _label_costs(axes: Axes, caption: str) -> list[Label]:
    """Each cost below the axis, but for one that would touch the one before; then what they are."""
    bottom, labels, end = FRAME.top + FRAME.height, [], -math.inf
    for cost in axes.costs:
        text, x = f"{cost:.3g}", axes.place_cost(cost)
        half = DIGIT * max(len(text), 2) / 2
        if x - half >= end:
            labels.append(Label(f"{x:.1f}", f"{bottom + 16}", "middle", text))
            end = x + half
    return [*labels, Label(f"{FRAME.left + FRAME.width / 2}", f"{bottom + 32}", "middle", caption)]
