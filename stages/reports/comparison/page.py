"""One HTML file for several runs, in the report's looks: figures, differences, images, curves, what was set apart."""

from __future__ import annotations

from html import escape
from pathlib import Path

from dmdr.metrics.scorecard import Figures
from stages.reports.bars import render_categories
from stages.reports.charts import render_chart, thin
from stages.reports.comparison.merged import (
    have_same_prompts,
    join_names,
    list_models,
    list_remarks,
    list_seconds,
    merge_scorecards,
)
from stages.reports.comparison.results import Evaluated
from stages.reports.gallery import Row
from stages.reports.html import MARK, format_count, render_document, render_plain_table, render_table
from stages.reports.nfe import render_plots
from stages.reports.page import render_leads, render_verdicts
from stages.reports.pictures import LARGE, render_side_by_side
from stages.reports.provenance import teacher_name
from stages.reports.style import COLOURS
from stages.reports.table1 import render_descriptions, render_figures, render_missing
from stages.reports.verdict import deciding_metric

SHOWN = 12  # prompts with images: the largest leads and the largest losses


def write_page(runs: list[Evaluated], out: Path) -> Figures:
    """Write the page and return the merged scorecard."""
    card = merge_scorecards(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render_page(runs, card), encoding="utf-8")
    return card


def render_page(runs: list[Evaluated], card: Figures) -> str:
    """The whole page; every text in it is escaped."""
    names = [each.run for each in runs]
    title = f"{join_names(names)} compared"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">Each run by its student; {escape(_render_prompts(runs))}.</p>',
    ]
    if told := "".join(f"<li>{escape(each)}</li>" for each in list_remarks(runs)):
        body.append(f'<ul class="remarks">{told}</ul>')
    body += [
        render_verdicts(card),
        "<h2>Scorecard</h2>",
        render_figures(card, list_seconds(runs), None),
        f'<p class="faint"><small>{NOTE}</small></p>',
    ]
    body += [render_missing(card), render_descriptions(card), "<h2>Quality against NFE</h2>", render_plots(card)]
    if card.tags:
        body += ["<h2>By category</h2>", render_categories(card, None)]
    if card.paired:
        body += [f"<h2>The lead of {escape(names[0])}, prompt by prompt</h2>", render_leads(card)]
    body += render_images(runs, card)
    if drawn := render_curves(runs):
        body += ["<h2>Reward curves of joint training</h2>", drawn]
    body += ["<h2>Settings that differ</h2>", render_settings(runs), "<h2>Provenance</h2>", render_provenance(runs)]
    return render_document(title, body)


NOTE = (
    f"{MARK} A student here was trained to raise this very number, so it proves little. Higher is better everywhere. "
    "Below each mean: its 95 % interval over prompts. NFE: forwards of the network an image; guidance (CFG) doubles "
    "them, unless it is an input. Seconds an image were measured in each run's own evaluation, see provenance."
)


def _render_prompts(runs: list[Evaluated]) -> str:
    if all(have_same_prompts(runs[0], each) for each in runs):
        return f"all were judged on the same {format_count(len(runs[0].prompts), 'prompt')}"
    return "not all were judged on the same prompts"


def render_images(runs: list[Evaluated], card: Figures) -> list[str]:
    """Prompts that all runs kept images of, from the largest lead of the first over the second to its largest loss."""
    compared = list_models(runs)
    first, second = runs[0], runs[1]
    if any(each.prompts != first.prompts for each in runs):
        return []
    kept = set.intersection(*(set(owners[0].images[model]) for owners, model in compared.values()))
    figure = deciding_metric(card)
    ours, theirs = (each.scores[each.student.name].get(figure, {}) for each in (first, second))
    lead = {place: ours[place] - theirs[place] for place in kept if place in ours and place in theirs}
    places = sorted((p for p in lead if lead[p] == lead[p]), key=lambda place: (-lead[place], place))
    places = places if len(places) <= SHOWN else places[: SHOWN // 2] + places[-SHOWN // 2 :]
    if not places:
        return []
    rows = []
    for place in places:
        row = Row(first.prompts[place][1], f"{lead[place]:+.3f} {figure}")
        for name, (owners, model) in compared.items():
            row.images[name] = owners[0].images[model][place]
            value = owners[0].scores[model].get(figure, {}).get(place)
            row.notes[name] = "" if value is None else f"{figure} {value:.2f}"
        rows.append(row)
    order = f"By the lead of {first.run} over {second.run} in {figure}, among the prompts whose images were kept"
    return ["<h2>Images</h2>", f'<p class="faint">{LARGE}</p>', render_side_by_side(card, {order: rows})]


def render_curves(runs: list[Evaluated]) -> str:
    """A chart a column, the runs over each other; empty where no run has any."""
    charts = []
    for column in dict.fromkeys(column for each in runs for column in each.curves):
        lines = [(n, each.run, each.curves[column]) for n, each in enumerate(runs) if column in each.curves]
        end = max(points[-1][0] for _, _, points in lines)
        drawn = [(name, 0.0, thin(points)) for _, name, points in lines]
        charts.append(render_chart(column, drawn, end, colours=[n % len(COLOURS) for n, _, _ in lines]))
    key = "".join(
        f'<i class="k{n % len(COLOURS)}"></i>{escape(each.run)}' for n, each in enumerate(runs) if each.curves
    )
    return (
        f'<p class="faint key">By student update:{key}</p><div class="charts">{"".join(charts)}</div>' if charts else ""
    )


def render_settings(runs: list[Evaluated]) -> str:
    """Runs by those settings that are not the same in all."""
    keys = sorted({key for each in runs for key in each.settings})
    lines = []
    for key in keys:
        values = [each.settings.get(key, "not set") for each in runs]
        if any(value != values[0] for value in values):
            cells = "".join(f"<td><code>{escape(str(value))}</code></td>" for value in values)
            lines.append(f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>')
    head = '<th scope="col">setting</th>' + "".join(f'<th scope="col">{escape(each.run)}</th>' for each in runs)
    return render_table(head, lines, name="Settings that differ", kind="sticky") if lines else "<p>None.</p>"


def render_provenance(runs: list[Evaluated]) -> str:
    """A line a run: its teacher, its evaluation and what it was drawn on."""
    return render_plain_table([(each.run, _describe_record(each)) for each in runs], name="Provenance")


def _describe_record(run: Evaluated) -> str:
    record, card, speed = run.records["evaluate"], run.card, run.speed
    teacher, how = record.inputs["teacher"], record.provenance
    named = f"sha256 {teacher}" if how.teacher is None else f"{teacher_name(how.teacher)}, sha256 {teacher}"
    drawn = f"{speed.device}, batches of {speed.batch_size}"
    cut = f"{format_count(card.truncated, 'evaluation prompt')} cut by the text encoder"
    return f"teacher {named}; {drawn}; {cut}; dmdr {how.code['version']}; evaluate {record.fingerprint}"
