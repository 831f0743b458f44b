"""report.html: one self-contained page (data: URIs, inline SVG and CSS, no script) that a user can read and pass on.

card.py says which scorecards it shows, table1.py bars.py nfe.py pictures.py make its parts, html.py and style.py what
all pages share; paper.py holds the paper's numbers.
"""

from __future__ import annotations

from html import escape

from stages.reports.bars import categories
from stages.reports.card import readable
from stages.reports.charts import Point, charts
from stages.reports.gallery import Row, Strip
from stages.reports.html import plain, shown, table, whole
from stages.reports.nfe import plots
from stages.reports.pictures import LARGE, diversity, sides
from stages.reports.table1 import figure_name, scorecard
from stages.reports.verdict import number, verdicts, word

SUBJECT = {  # of the page, by the model that is compared with the others
    "student": "a {steps}-step student",
    "cold start": "a {steps}-step student after its cold start",
    "teacher": "the teacher at {steps} steps",
    "naive teacher": "the teacher at {steps} steps without guidance",
}


def page(
    card: dict,
    *,
    teacher: str,
    rows: dict[str, list[Row]],
    strips: list[Strip],
    curves: dict[str, dict[str, list[Point]]],
    provenance: list[tuple[str, str]],
    settings: dict[str, object],
    base: str | None = None,
) -> str:
    """The whole page; every text in it is escaped.

    card: dmdr.metrics.scorecard. rows: heading -> prompts with an image of each model; strips: prompts with several.
    curves: stage -> columns of its metrics.jsonl. provenance: what and how, line by line. settings: the identity part
    of the config, flat. base: the teacher as the paper calls it (stages.reports.paper.base_model).

    Raises:
        DataError: the card has another schema.
    """
    readable(card, f"{card['run']}/evaluate")
    first, images_each = card["models"][0], card["images_per_prompt"]
    subject = SUBJECT.get(first["name"], f"{first['label']} at {first['steps']} steps")
    title = f"{card['run']}: {subject.format(steps=first['steps'])}"
    each = f", {images_each} images each" if images_each > 1 else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">of {escape(teacher)}, on {card["prompts"]:,} evaluation prompts{each}; '
        "every model met the same prompts and the same noise</p>",
        cards(card),
        "<h2>Scorecard</h2>",
        scorecard(card, base),
        "<h2>Quality against NFE</h2>",
        '<p class="faint">Up and to the left is better: a higher score for fewer forwards of the network.</p>',
        plots(card),
    ]
    if card["tags"]:
        body += ["<h2>By category</h2>", categories(card, base)]
    if card["paired"]:
        body += [f"<h2>The lead of the {escape(first['label'])}, prompt by prompt</h2>", leads(card)]
    body += images(card, rows, strips)
    if curves:
        colours = "".join(f'<i class="k{number}"></i>{escape(stage)}' for number, stage in enumerate(curves))
        body += ["<h2>Training</h2>", f'<p class="faint key">Student updates, end to end:{colours}</p>', charts(curves)]
    body += ["<h2>Provenance</h2>", plain(provenance, name="Provenance")]
    flat = plain([(name, str(value)) for name, value in settings.items()], name="All settings")
    body.append(f"<details><summary>All settings that name this result</summary>{flat}</details>")
    return whole(title, body)


def cards(card: dict) -> str:
    """One verdict a comparison."""
    parts = []
    for each in verdicts(card):
        before, after = each["text"].rsplit(f": {each['word']}, ", 1)
        also = f"<small>Also {escape(each['also'])}.</small>" if each["also"] else ""
        kind = each["word"].split()[0]
        parts.append(
            f'<p class="card {kind}">{escape(before)}: <b>{escape(each["word"])}</b>, {escape(after)}{also}</p>'
        )
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def leads(card: dict) -> str:
    """Paired differences, each row's first model less its second."""
    others = list(dict.fromkeys(each["b"] for each in card["paired"]))
    found = {(each["metric"], each["b"]): each for each in card["paired"]}
    rows = []
    for figure in dict.fromkeys(each["metric"] for each in card["paired"]):
        cells = [_lead(found.get((figure, other))) for other in others]
        rows.append(f'<tr><th scope="row">{figure_name(card, figure)}</th>{"".join(cells)}</tr>')
    labels = {model["name"]: model["label"] for model in card["models"]}
    head = '<th scope="col">metric</th>' + "".join(f'<th scope="col">over {escape(labels[b])}</th>' for b in others)
    return table(head, rows, name="Differences prompt by prompt", kind="sticky")


def _lead(pair: dict | None) -> str:
    if pair is None:
        return "<td>–</td>"
    outcome = word(pair["low"], pair["high"])
    ends = f"{number(pair['low'], '+')} to {number(pair['high'], '+')}"
    under = "" if pair["difference"] is None else f"<small>{ends}</small>"
    verdict = f'<small><b class="{outcome.split()[0]}">{outcome}</b></small>'
    return f"<td>{shown(pair['difference'], '+')}{under}{verdict}</td>"


def images(card: dict, rows: dict[str, list[Row]], strips: list[Strip]) -> list[str]:
    """Side by side, then strips; either only where there are some."""
    parts = []
    if any(rows.values()):
        parts += [f'<h2>Images</h2><p class="faint">Same prompt, same noise. {LARGE}</p>', sides(card, rows)]
    if strips:
        said = "The more alike a model's images of one prompt are, the less varied it is."
        parts += [f'<h2>Diversity</h2><p class="faint">{said}</p>', diversity(card, strips)]
    return parts
