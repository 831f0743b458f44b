"""report.html: one self-contained page (data: URIs, inline SVG, CSS and script) that a user can read and pass on.

Here its content is computed, with headline.py, table1.py, bars.py, leads.py, nfe.py, charts.py, pictures.py and
explorer.py for the parts; templates/report.html.jinja shows it. paper.py holds the paper's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmdr.metrics.scorecard import MissingMetric, Scorecard, Speed
from stages.reports.bars import Categories, build_categories
from stages.reports.broken_images import BrokenImages, say_broken
from stages.reports.charts import Chart, Point, build_charts
from stages.reports.explorer import Explorer, Prompt, build_explorer
from stages.reports.film import Film
from stages.reports.gallery import FEATURED, Row, Strip
from stages.reports.glossary import Word, list_words
from stages.reports.headline import Headline, build_headline, list_other_verdicts
from stages.reports.leads import Leads, build_leads
from stages.reports.nfe import (
    Cost,
    Marker,
    PlotGroup,
    build_markers,
    build_plot_groups,
    measure_nfe,
    measure_seconds,
    measure_training,
)
from stages.reports.pictures import SideBySide, Strips, lay_out_strips, place_side_by_side
from stages.reports.provenance import Origin
from stages.reports.rendering import render_template
from stages.reports.stage_times import StageTime, select_training, sum_training
from stages.reports.table1 import Notes, Table1, build_notes, build_table1, describe_metrics
from stages.reports.verdict import Verdict

SUBJECT = {  # of the page, by the model that is compared with the others
    "student": "a {steps}-step student",
    "cold start": "a {steps}-step student after its cold start",
    "start": "the {steps}-step model that the student starts from",
    "teacher": "the teacher at {steps} steps",
    "naive teacher": "the teacher at {steps} steps without guidance",
}
LEADING = ("teacher", "student", "naive teacher")  # the models of the grid on top, in its order
GLANCE = 6  # training curves that are shown at once


@dataclass(frozen=True)
class Shown:
    """The images and prompts that a page shows.

    featured: the few that lead; sections: heading -> prompts with an image of each model; strips: prompts with several;
    prompts: all of them; broken: model by model.
    """

    featured: Sequence[Row]
    sections: Mapping[str, Sequence[Row]]
    strips: Sequence[Strip]
    prompts: Sequence[Prompt]
    broken: Sequence[BrokenImages]


@dataclass(frozen=True)
class ReportPage:
    """The whole page.

    compared: the model that is compared with the others. sections: heading -> prompts with an image of each model.
    films: of the training stages that showed images. stages: (number of the colour, name) of those whose curves are
    shown. glance: the first charts; charts: the others.
    """

    title: str
    teacher: str
    prompts: int
    images_per_prompt: int
    compared: str
    headline: Headline
    warning: str | None
    featured: Sequence[SideBySide]
    verdicts: Sequence[Verdict]
    table1: Table1
    notes: Notes
    missing: Sequence[MissingMetric]
    descriptions: Sequence[tuple[str, str]]
    markers: Sequence[Marker]
    plots: Sequence[PlotGroup]
    categories: Sequence[Categories]
    leads: Leads | None
    sections: Mapping[str, Sequence[SideBySide]]
    strips: Sequence[Strips]
    broken: Sequence[BrokenImages]
    explorer: Explorer | None
    films: Sequence[Film]
    stages: Sequence[tuple[int, str]]
    glance: Sequence[Chart]
    charts: Sequence[Chart]
    times: Sequence[StageTime]
    words: Sequence[Word]
    provenance: Sequence[tuple[str, str]]
    settings: Mapping[str, object]


def render_page(
    card: Scorecard,
    speed: Speed,
    origin: Origin,
    *,
    shown: Shown,
    curves: Mapping[str, Mapping[str, Sequence[Point]]],
    films: Sequence[Film] = (),
) -> str:
    """The page as HTML. curves: stage -> columns of its metrics.jsonl. films: of the training stages."""
    labels = {model.name: model.label for model in card.models}
    sections = {heading: place_side_by_side(rows, labels) for heading, rows in shown.sections.items()}
    charts = build_charts(curves)
    page = ReportPage(
        title=f"{card.run}: {describe_subject(card)}",
        teacher=origin.teacher,
        prompts=card.prompts,
        images_per_prompt=card.images_per_prompt,
        compared=card.models[0].label,
        headline=build_headline(card, speed, select_training(card.models[0].name, origin.times) or []),
        warning=next((say_broken(each) for each in shown.broken if each.model == card.models[0].label), None),
        featured=place_side_by_side(shown.featured, label_leading(card), FEATURED),
        verdicts=list_other_verdicts(card),
        table1=build_table1(card, speed.seconds_per_image, speed.spread, base=origin.base),
        notes=build_notes(card, speed),
        missing=card.missing,
        descriptions=describe_metrics(card),
        markers=build_markers(card),
        plots=build_plot_groups(card, list_costs(card, speed, origin.times)),
        categories=build_categories(card, origin.base),
        leads=build_leads(card),
        sections=sections if any(sections.values()) else {},
        strips=lay_out_strips(shown.strips, labels),
        broken=shown.broken,
        explorer=build_explorer(card, shown.prompts) if shown.prompts else None,
        films=films,
        stages=list(enumerate(curves)),
        glance=charts[:GLANCE],
        charts=charts[GLANCE:],
        times=origin.times,
        words=list_words(card),
        provenance=origin.lines,
        settings=origin.settings,
    )
    return render_template("report.html.jinja", page=page)


def label_leading(card: Scorecard) -> dict[str, str]:
    """The models of the grid on top, with their labels: teacher, student and naive teacher, or the first ones."""
    models = {model.name: f"{model.label}, {model.nfe} NFE" for model in card.models}
    leading = [model for model in LEADING if model in models]
    others = [model for model in models if model not in leading]
    return {model: models[model] for model in [*leading, *others][: len(LEADING)]}


def list_costs(card: Scorecard, speed: Speed, times: Sequence[StageTime]) -> list[Cost]:
    """NFE, seconds, and training where it is known."""
    costs = [measure_nfe(card), measure_seconds(speed.seconds_per_image)]
    training = sum_training([model.name for model in card.models], times)
    if training is not None:
        device, seconds = training
        costs.append(measure_training(seconds, device))
    return costs


def describe_subject(card: Scorecard) -> str:
    """What the page is about: the first model, and in how many steps it draws."""
    first = card.models[0]
    known = SUBJECT.get(first.name)
    return known.format(steps=first.steps) if known else f"{first.label} at {first.steps} steps"
