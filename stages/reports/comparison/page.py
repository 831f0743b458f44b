"""One HTML file for several runs: their figures, differences, images, curves, and what they do not have in common.

Here its content is computed; templates/comparison.html.jinja shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmdr.metrics.scorecard import Figures, MissingMetric
from stages.reports.bars import Categories, build_categories
from stages.reports.charts import Chart, Curve, build_chart, thin
from stages.reports.comparison.merged import (
    ComparedModel,
    find_shared,
    have_same_prompts,
    list_models,
    list_seconds,
    list_spreads,
    merge_scorecards,
    sum_training_of,
)
from stages.reports.comparison.remarks import list_remarks
from stages.reports.comparison.results import EvaluatedRun
from stages.reports.gallery import Row
from stages.reports.glossary import Word, list_words
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
from stages.reports.numbers import format_count
from stages.reports.pictures import SideBySide, place_side_by_side
from stages.reports.rendering import render_template
from stages.reports.sentences import join_names
from stages.reports.style import COLOURS
from stages.reports.table1 import Table1, build_table1, describe_metrics
from stages.reports.verdict import Verdict, deciding_metric, list_verdicts
from stages.store.published_teachers import teacher_name

SHOWN = 12  # prompts with images: the largest leads and the largest losses


@dataclass(frozen=True)
class ImageSection:
    """Prompts of which all runs kept images, ordered by the lead of the first run over the second in one figure."""

    first: str
    second: str
    figure: str
    prompts: Sequence[SideBySide]


@dataclass(frozen=True)
class CurveSection:
    """A chart for each column. runs: (number of the colour, name) of those that have curves."""

    runs: Sequence[tuple[int, str]]
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Setting:
    """A setting that is not the same in all runs; values: run by run."""

    name: str
    values: Sequence[str]


@dataclass(frozen=True)
class ComparisonPage:
    """The whole page. prompts: how many all runs were judged on, None where not all have the same.

    provenance: (run, where its evaluation comes from).
    """

    title: str
    runs: Sequence[str]
    prompts: int | None
    remarks: Sequence[str]
    verdicts: Sequence[Verdict]
    table1: Table1
    missing: Sequence[MissingMetric]
    descriptions: Sequence[tuple[str, str]]
    markers: Sequence[Marker]
    plots: Sequence[PlotGroup]
    categories: Sequence[Categories]
    leads: Leads | None
    images: ImageSection | None
    curves: CurveSection | None
    settings: Sequence[Setting]
    words: Sequence[Word]
    provenance: Sequence[tuple[str, str]]


def write_page(runs: list[EvaluatedRun], out: Path) -> Figures:
    """Write the page and return the merged scorecard."""
    card = merge_scorecards(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render_page(runs, card), encoding="utf-8")
    return card


def render_page(runs: list[EvaluatedRun], card: Figures) -> str:
    """The page as HTML."""
    names = [run.run for run in runs]
    same_prompts = all(have_same_prompts(runs[0], run) for run in runs)
    page = ComparisonPage(
        title=f"{join_names(names)} compared",
        runs=names,
        prompts=len(runs[0].prompts) if same_prompts else None,
        remarks=list_remarks(runs),
        verdicts=list_verdicts(card),
        table1=build_table1(card, list_seconds(runs), list_spreads(runs), base=None),
        missing=card.missing,
        descriptions=describe_metrics(card),
        markers=build_markers(card),
        plots=build_plot_groups(card, _list_costs(runs, card)),
        categories=build_categories(card, None),
        leads=build_leads(card),
        images=build_images(runs, card),
        curves=build_curves(runs),
        settings=list_differing_settings(runs),
        words=list_words(card),
        provenance=[(run.run, describe_evaluation(run)) for run in runs],
    )
    return render_template("comparison.html.jinja", page=page)


def _list_costs(runs: list[EvaluatedRun], card: Figures) -> list[Cost]:
    """NFE, seconds, and training where it ran on one kind of device."""
    training = sum_training_of(runs)
    costs = [measure_nfe(card), measure_seconds(list_seconds(runs))]
    return costs if training is None else [*costs, measure_training(training[1], training[0])]


def build_images(runs: list[EvaluatedRun], card: Figures) -> ImageSection | None:
    """At most SHOWN prompts, from the largest lead of the first run over the second to its largest loss.

    None where no prompt has images of all models.
    """
    first, second = runs[0], runs[1]
    models, figure = list_models(runs), deciding_metric(card)
    places = {name: find_shared(first, model.owners[0]) for name, model in models.items()}
    leads = _collect_leads(first, second, figure, _list_kept(models, places))
    chosen = sorted(leads, key=lambda place: (-leads[place], place))
    if len(chosen) > SHOWN:
        chosen = chosen[: SHOWN // 2] + chosen[-SHOWN // 2 :]
    if not chosen:
        return None
    rows = [
        Row(
            first.prompts[place].text,
            f"{leads[place]:+.3f} {figure}",
            {name: model.images[places[name][place]] for name, model in models.items()},
            {name: _describe_score(model, figure, places[name][place]) for name, model in models.items()},
        )
        for place in chosen
    ]
    labels = {model.name: model.label for model in card.models}
    return ImageSection(first.run, second.run, figure, place_side_by_side(rows, labels))


def _list_kept(models: dict[str, ComparedModel], places: dict[str, dict[int, int]]) -> set[int]:
    """Places in the first run of the prompts that have an image of every model. places: of these prompts, by model."""
    return set.intersection(
        *({place for place, own in places[name].items() if own in model.images} for name, model in models.items())
    )


def _collect_leads(first: EvaluatedRun, second: EvaluatedRun, figure: str, places: set[int]) -> dict[int, float]:
    """place -> the lead of the first run over the second, where it is a number."""
    ours, theirs = (run.scores[run.student.name].get(figure, {}) for run in (first, second))
    there = find_shared(first, second)
    leads = {place: ours[place] - theirs[there[place]] for place in places if place in ours and there[place] in theirs}
    return {place: lead for place, lead in leads.items() if not math.isnan(lead)}


def _describe_score(model: ComparedModel, figure: str, place: int) -> str:
    score = model.scores.get(figure, {}).get(place)
    return "" if score is None else f"{figure} {score:.2f}"


def build_curves(runs: list[EvaluatedRun]) -> CurveSection | None:
    """A chart for each column, with a curve for each run that has it; None where no run has any."""
    charts = []
    for column in dict.fromkeys(column for run in runs for column in run.curves):
        curves = [
            Curve(thin(run.curves[column]), number % len(COLOURS))
            for number, run in enumerate(runs)
            if column in run.curves
        ]
        end = max(curve.points[-1].update for curve in curves)
        charts.append(build_chart(column, curves, end=end, shows_last=False))
    if not charts:
        return None
    return CurveSection([(n % len(COLOURS), run.run) for n, run in enumerate(runs) if run.curves], charts)


def list_differing_settings(runs: list[EvaluatedRun]) -> list[Setting]:
    """The settings that are not the same in all runs, by name."""
    differing = []
    for name in sorted({name for run in runs for name in run.settings}):
        values = [run.settings.get(name, "not set") for run in runs]
        if any(value != values[0] for value in values):
            differing.append(Setting(name, [str(value) for value in values]))
    return differing


def describe_evaluation(run: EvaluatedRun) -> str:
    """Teacher, device, prompts that were cut, version and fingerprint."""
    record, speed = run.records["evaluate"], run.speed
    provenance, digest = record.provenance, f"sha256 {record.teacher_digest}"
    teacher = digest if provenance.teacher is None else f"{teacher_name(provenance.teacher)}, {digest}"
    drawn = f"{speed.device}, batches of {speed.batch_size}"
    cut = f"{format_count(run.card.truncated, 'evaluation prompt')} cut by the text encoder"
    version = f"dmdr {provenance.code['version']}"
    return f"teacher {teacher}; {drawn}; {cut}; {version}; evaluate {record.fingerprint}"
