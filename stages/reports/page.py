"""report.html: one self-contained page (data: URIs, inline SVG and CSS, no script) that a user can read and pass on.

card.py says which scorecards it shows, table1.py bars.py nfe.py pictures.py make its parts, html.py and style.py what
all pages share; paper.py holds the paper's numbers.
"""

from __future__ import annotations

from html import escape

from dmdr.metrics.scorecard import Figures, PairedDifference, Scorecard, Speed
from stages.reports.bars import render_categories
from stages.reports.charts import Point, render_charts
from stages.reports.gallery import Row, Strip
from stages.reports.html import format_figure, render_document, render_plain_table, render_table
from stages.reports.nfe import render_plots
from stages.reports.pictures import LARGE, render_side_by_side, render_strips
from stages.reports.provenance import Origin
from stages.reports.table1 import figure_name, render_scorecard
from stages.reports.verdict import format_number, list_verdicts, outcome_word

SUBJECT = {  # of the page, by the model that is compared with the others
    "student": "a {steps}-step student",
    "cold start": "a {steps}-step student after its cold start",
    "teacher": "the teacher at {steps} steps",
    "naive teacher": "the teacher at {steps} steps without guidance",
}


def render_page(
    card: Scorecard,
    speed: Speed,
    origin: Origin,
    *,
    rows: dict[str, list[Row]],
    strips: list[Strip],
    curves: dict[str, dict[str, list[Point]]],
) -> str:
    """The whole page; every text in it is escaped.

    rows: heading -> prompts with an image of each model; strips: prompts with several. curves: stage -> columns of its
    metrics.jsonl.
    """
    first, images_each = card.models[0], card.images_per_prompt
    subject = SUBJECT.get(first.name, f"{first.label} at {first.steps} steps")
    title = f"{card.run}: {subject.format(steps=first.steps)}"
    each = f", {images_each} images each" if images_each > 1 else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">of {escape(origin.teacher)}, on {card.prompts:,} evaluation prompts{each}; '
        "every model met the same prompts and the same noise</p>",
        render_verdicts(card),
        "<h2>Scorecard</h2>",
        render_scorecard(card, speed, origin.base),
        "<h2>Quality against NFE</h2>",
        '<p class="faint">Up and to the left is better: a higher score for fewer forwards of the network.</p>',
        render_plots(card),
    ]
    if card.tags:
        body += ["<h2>By category</h2>", render_categories(card, origin.base)]
    if card.paired:
        body += [f"<h2>The lead of the {escape(first.label)}, prompt by prompt</h2>", render_leads(card)]
    body += render_images(card, rows, strips)
    if curves:
        colours = "".join(f'<i class="k{number}"></i>{escape(stage)}' for number, stage in enumerate(curves))
        body += [
            "<h2>Training</h2>",
            f'<p class="faint key">Student updates, end to end:{colours}</p>',
            render_charts(curves),
        ]
    body += ["<h2>Provenance</h2>", render_plain_table(origin.lines, name="Provenance")]
    flat = render_plain_table([(name, str(value)) for name, value in origin.settings.items()], name="All settings")
    body.append(f"<details><summary>All settings that name this result</summary>{flat}</details>")
    return render_document(title, body)


def render_verdicts(card: Figures) -> str:
    """One verdict a comparison."""
    parts = []
    for each in list_verdicts(card):
        before, after = each.text.rsplit(f": {each.word}, ", 1)
        also = f"<small>Also {escape(each.also)}.</small>" if each.also else ""
        kind = each.word.split()[0]
        parts.append(f'<p class="card {kind}">{escape(before)}: <b>{escape(each.word)}</b>, {escape(after)}{also}</p>')
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def render_leads(card: Figures) -> str:
    """Paired differences, each row's first model less its second."""
    others = list(dict.fromkeys(each.b for each in card.paired))
    found = {(each.metric, each.b): each for each in card.paired}
    rows = []
    for figure in dict.fromkeys(each.metric for each in card.paired):
        cells = [_render_lead(found.get((figure, other))) for other in others]
        rows.append(f'<tr><th scope="row">{figure_name(card, figure)}</th>{"".join(cells)}</tr>')
    labels = {model.name: model.label for model in card.models}
    head = '<th scope="col">metric</th>' + "".join(f'<th scope="col">over {escape(labels[b])}</th>' for b in others)
    return render_table(head, rows, name="Differences prompt by prompt", kind="sticky")


def _render_lead(pair: PairedDifference | None) -> str:
    if pair is None:
        return "<td>–</td>"
    outcome = outcome_word(pair.low, pair.high)
    ends = f"{format_number(pair.low, '+')} to {format_number(pair.high, '+')}"
    under = "" if pair.difference is None else f"<small>{ends}</small>"
    verdict = f'<small><b class="{outcome.split()[0]}">{outcome}</b></small>'
    return f"<td>{format_figure(pair.difference, '+')}{under}{verdict}</td>"


def render_images(card: Figures, rows: dict[str, list[Row]], strips: list[Strip]) -> list[str]:
    """Side by side, then strips; either only where there are some."""
    parts = []
    if any(rows.values()):
        parts += [
            f'<h2>Images</h2><p class="faint">Same prompt, same noise. {LARGE}</p>',
            render_side_by_side(card, rows),
        ]
    if strips:
        said = "The more alike a model's images of one prompt are, the less varied it is."
        parts += [f'<h2>Diversity</h2><p class="faint">{said}</p>', render_strips(card, strips)]
    return parts
