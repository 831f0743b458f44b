"""report.html: one self-contained page (data: URIs, inline SVG and CSS, no script) that a user can read and pass on.

Here its content is computed, with table1.py, bars.py, leads.py, nfe.py, charts.py and pictures.py for the parts;
templates/report.html.jinja shows it. paper.py holds the paper's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmdr.metrics.scorecard import MissingMetric, Scorecard, Speed
from stages.reports.bars import Categories, build_categories
from stages.reports.charts import Chart, Point, build_charts
from stages.reports.gallery import Row, Strip
from stages.reports.leads import Leads, VerdictCard, build_leads, build_verdicts
from stages.reports.nfe import Marker, Plot, build_markers, build_plots
from stages.reports.pictures import SideBySide, Strips, lay_out_strips, place_side_by_side
from stages.reports.provenance import Origin
from stages.reports.rendering import render_template
from stages.reports.table1 import Notes, Table1, build_notes, build_table1, describe_metrics

SUBJECT = {  # of the page, by the model that is compared with the others
    "student": "a {steps}-step student",
    "cold start": "a {steps}-step student after its cold start",
    "teacher": "the teacher at {steps} steps",
    "naive teacher": "the teacher at {steps} steps without guidance",
}


@dataclass(frozen=True)
class ReportPage:
    """The whole page.

    compared: the model that is compared with the others. sections: heading -> prompts with an image of each model.
    stages: (number of the colour, name) of those whose curves are shown.
    """

    title: str
    teacher: str
    prompts: int
    images_per_prompt: int
    compared: str
    verdicts: Sequence[VerdictCard]
    table1: Table1
    notes: Notes
    missing: Sequence[MissingMetric]
    descriptions: Sequence[tuple[str, str]]
    markers: Sequence[Marker]
    plots: Sequence[Plot]
    categories: Sequence[Categories]
    leads: Leads | None
    sections: Mapping[str, Sequence[SideBySide]]
    strips: Sequence[Strips]
    stages: Sequence[tuple[int, str]]
    charts: Sequence[Chart]
    provenance: Sequence[tuple[str, str]]
    settings: Mapping[str, object]


def render_page(
    card: Scorecard,
    speed: Speed,
    origin: Origin,
    *,
    rows: Mapping[str, Sequence[Row]],
    strips: Sequence[Strip],
    curves: Mapping[str, Mapping[str, Sequence[Point]]],
) -> str:
    """The page as HTML.

    rows: heading -> prompts with an image of each model; strips: prompts with several. curves: stage -> columns of its
    metrics.jsonl.
    """
    labels = {model.name: model.label for model in card.models}
    sections = {heading: place_side_by_side(of_heading, labels) for heading, of_heading in rows.items()}
    page = ReportPage(
        title=f"{card.run}: {describe_subject(card)}",
        teacher=origin.teacher,
        prompts=card.prompts,
        images_per_prompt=card.images_per_prompt,
        compared=card.models[0].label,
        verdicts=build_verdicts(card),
        table1=build_table1(card, speed.seconds_per_image, origin.base),
        notes=build_notes(card, speed),
        missing=card.missing,
        descriptions=describe_metrics(card),
        markers=build_markers(card),
        plots=build_plots(card),
        categories=build_categories(card, origin.base),
        leads=build_leads(card),
        sections=sections if any(sections.values()) else {},
        strips=lay_out_strips(strips, labels),
        stages=list(enumerate(curves)),
        charts=build_charts(curves),
        provenance=origin.lines,
        settings=origin.settings,
    )
    return render_template("report.html.jinja", page=page)


def describe_subject(card: Scorecard) -> str:
    """What the page is about: the first model, and in how many steps it draws."""
    first = card.models[0]
    known = SUBJECT.get(first.name)
    return known.format(steps=first.steps) if known else f"{first.label} at {first.steps} steps"
