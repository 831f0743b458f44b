"""report.html: one self-contained page (data: URIs, inline SVG and CSS, no script) that a user can read and pass on."""

from __future__ import annotations

import base64
from html import escape

from stages.charts import Point, charts
from stages.gallery import Row, png, tile
from stages.verdict import deciding, number, verdicts, word

STYLE = """
:root { color-scheme: light dark; --ink:#1b1e24; --faint:#5d6470; --paper:#fff; --card:#f5f6f8; --line:#d9dce2;
  --good:#137a3e; --bad:#b3261e; --one:#2457c5; --two:#c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink:#e7e9ee; --faint:#9aa3b2; --paper:#14161a; --card:#1e2127;
  --line:#363b45; --good:#5fd08b; --bad:#ff8a80; --one:#7fa8ff; --two:#ffa062; } }
* { box-sizing:border-box } body { margin:0 auto; max-width:70rem; padding:2rem 1.25rem 4rem; background:var(--paper);
  color:var(--ink); font:16px/1.5 system-ui,sans-serif }
h1 { font-size:1.7rem; margin:0 0 .25rem; line-height:1.2 } h2 { font-size:1.2rem; margin:2.5rem 0 .75rem }
p { margin:.4rem 0; max-width:46rem } .faint, small { color:var(--faint) } small { font-size:.82rem }
.card { background:var(--card); border-left:4px solid var(--line); border-radius:4px; padding:.7rem 1rem;
  margin:.6rem 0 }
.card.better { border-color:var(--good) } .card.worse, .card.undecided { border-color:var(--bad) }
.better b, b.better { color:var(--good) } .worse b, b.worse, b.undecided, b.bad { color:var(--bad) }
.scroll { overflow-x:auto } table { border-collapse:collapse; font-variant-numeric:tabular-nums; min-width:24rem }
th, td { text-align:right; padding:.4rem .8rem; border-bottom:1px solid var(--line); vertical-align:top }
th:first-child, td:first-child { text-align:left }
thead th { border-bottom:2px solid var(--line); vertical-align:bottom }
td small, th small { display:block; font-weight:400; white-space:nowrap } tr.total td { font-weight:600 }
summary { cursor:pointer; padding:.3rem 0 }
.mark { background:var(--two); color:var(--paper); border-radius:3px; padding:0 .35rem; font-size:.75rem;
  font-weight:600; white-space:nowrap }
.images td, .images th { text-align:left; border:0; padding:.2rem .6rem .2rem 0 } .images .prompt { padding-top:1rem }
.images small { white-space:normal; line-height:1.3 } .images { width:100%; table-layout:fixed; min-width:34rem }
.whole { white-space:nowrap } .images td { width:25% }
.images img { display:block; width:100%; max-width:11rem; border-radius:3px }
img.tiny { image-rendering:pixelated }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(19rem,1fr)); gap:1rem 1.25rem }
figure { margin:0 } figcaption { display:flex; gap:.6rem; justify-content:space-between; font-size:.85rem }
svg { width:100%; height:auto; display:block } .plot { fill:var(--card) } .tick { fill:var(--faint); font-size:10px }
path { fill:none; stroke-width:1.5 } .curve0 { stroke:var(--one) } .curve1 { stroke:var(--two) }
.dot0 { fill:var(--one) } .dot1 { fill:var(--two) }
.border { stroke:var(--faint); stroke-dasharray:3 3; stroke-width:1 }
.broken { stroke:var(--bad); stroke-width:1; opacity:.7 } .key i { display:inline-block; width:1.4rem; height:3px;
  vertical-align:middle; margin:0 .35rem 0 .9rem } .key .k0 { background:var(--one) } .key .k1 { background:var(--two) }
.plain td { text-align:left; overflow-wrap:anywhere } code { font-size:.85rem }
"""
MARK = '<span class="mark">trained on</span>'
DIVERSITY = (
    "Diversity is the mean distance between the images of one prompt: root mean square over pixels in [0, 1], or "
    "cosine distance in the image embedding of a held-out reward. Higher is more varied, which is no merit by itself."
)
SUBJECT = {  # of the page, by the model that is compared with the others
    "student": "a {steps}-step student",
    "cold start": "a {steps}-step student after its cold start",
    "teacher": "the teacher at {steps} steps",
    "naive teacher": "the teacher at {steps} steps without guidance",
}


def page(
    scorecard: dict,
    *,
    teacher: str,
    rows: list[Row],
    curves: dict[str, dict[str, list[Point]]],
    provenance: list[tuple[str, str]],
    settings: dict[str, object],
) -> str:
    """The whole page; every text in it is escaped.

    scorecard: dmdr.metrics.scorecard. curves: stage -> columns of its metrics.jsonl. provenance: what and how, line by
    line. settings: the identity part of the config, flat.
    """
    first, images_each = scorecard["models"][0], scorecard["images_per_prompt"]
    title = f"{scorecard['run']}: {SUBJECT[first['name']].format(steps=first['steps'])}"
    each = f", {images_each} images each" if images_each > 1 else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">of {escape(teacher)}, on {scorecard["prompts"]:,} evaluation prompts{each}; '
        "every model met the same prompts and the same noise</p>",
        cards(scorecard),
        "<h2>Scorecard</h2>",
        figures(scorecard),
    ]
    if scorecard["paired"]:
        body += [f"<h2>The lead of the {escape(first['name'])}, prompt by prompt</h2>", leads(scorecard)]
    if scorecard["tags"]:
        body += ["<h2>By task</h2>", tasks(scorecard)]
    body += ["<h2>Images</h2>", images(scorecard, rows)]
    if curves:
        colours = "".join(f'<i class="k{number}"></i>{escape(stage)}' for number, stage in enumerate(curves))
        body += ["<h2>Training</h2>", f'<p class="faint key">Student updates, end to end:{colours}</p>', charts(curves)]
    body += ["<h2>Provenance</h2>", plain(provenance), "<details><summary>All settings that name this result</summary>"]
    body += [plain([(name, str(value)) for name, value in settings.items()]), "</details>"]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def cards(scorecard: dict) -> str:
    """One verdict a comparison."""
    parts = []
    for each in verdicts(scorecard):
        before, after = each["text"].rsplit(f": {each['word']}, ", 1)
        also = f"<br><small>Also {escape(each['also'])}.</small>" if each["also"] else ""
        kind = each["word"].split()[0]
        parts.append(
            f'<p class="card {kind}">{escape(before)}: <b>{escape(each["word"])}</b>, {escape(after)}{also}</p>'
        )
    return "".join(parts)


def heading(model: dict) -> str:
    """A column's title: the model and how it was sampled."""
    guidance = f"CFG {model['guidance_scale']:g}" if model["guidance_scale"] > 1 else "no CFG"
    steps = f"{model['steps']} step{'s' * (model['steps'] > 1)}"
    return f"<th>{escape(model['name'])}<small>{steps}, {guidance}</small><small>{model['nfe']} NFE</small></th>"


def table(head: str, rows: list[str]) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def figure_name(scorecard: dict, metric: str) -> str:
    """A metric's name with the sign that it was trained on."""
    trained_on = any(each["trained_on"] for each in scorecard["metrics"] if each["name"] == metric)
    return f"{escape(metric)} {MARK}" if trained_on else escape(metric)


def shown(value: float | None, sign: str = "") -> str:
    """A number, or that it is none."""
    return f'<b class="bad">{number(value)}</b>' if value is None else number(value, sign)


def figures(scorecard: dict) -> str:
    """Metrics by models, each with its interval."""
    rows = []
    for metric in dict.fromkeys(each["name"] for each in scorecard["metrics"]):
        cells = []
        of_metric = [each for each in scorecard["metrics"] if each["name"] == metric]
        for each in of_metric:
            under = f"{number(each['low'])} to {number(each['high'])}"
            if each["mean"] is None:
                under = f"{each['broken']} of {each['n']} prompts"
            cells.append(f"<td>{shown(each['mean'])}<small>{under}</small></td>")
        count = f"<small>{of_metric[0]['n']:,} prompts</small>"
        rows.append(f"<tr><td>{figure_name(scorecard, metric)}{count}</td>{''.join(cells)}</tr>")
    note = (
        f"{MARK} The student was trained to raise this very number, so it proves little; the other metrics decide, "
        f"{escape(deciding(scorecard))} first. "
        if any(each["trained_on"] for each in scorecard["metrics"])
        else "The student was trained on none of these metrics. "
    )
    note += "Higher is better everywhere. Below each mean: its 95 % interval over prompts. "
    if scorecard["images_per_prompt"] > 1:
        note += f"A prompt's score is the mean over its {scorecard['images_per_prompt']} images. {DIVERSITY} "
    note += "NFE: forwards of the network an image; guidance (CFG) doubles them."
    return table("<th>metric</th>" + "".join(map(heading, scorecard["models"])), rows) + f"<p><small>{note}</small></p>"


def leads(scorecard: dict) -> str:
    """Paired differences."""
    others = [model["name"] for model in scorecard["models"][1:]]
    rows = []
    for metric in dict.fromkeys(each["metric"] for each in scorecard["paired"]):
        cells = []
        for each in scorecard["paired"]:
            if each["metric"] == metric:
                outcome = word(each["low"], each["high"])
                ends = f"{number(each['low'], '+')} to {number(each['high'], '+')}"
                under = "" if each["difference"] is None else f"<small>{ends}</small>"
                verdict = f'<small><b class="{outcome.split()[0]}">{outcome}</b></small>'
                cells.append(f"<td>{shown(each['difference'], '+')}{under}{verdict}</td>")
        rows.append(f"<tr><td>{figure_name(scorecard, metric)}</td>{''.join(cells)}</tr>")
    return table("<th>metric</th>" + "".join(f"<th>over the {escape(name)}</th>" for name in others), rows)


def tasks(scorecard: dict) -> str:
    """GenEval's tasks: a table a metric, the deciding one open."""
    models = [model["name"] for model in scorecard["models"]]
    head = f"<th>task</th><th>prompts</th>{''.join(f'<th>{escape(model)}</th>' for model in models)}"
    parts = []
    for metric, by_model in scorecard["tags"].items():
        rows = []
        for tag, of_student in by_model[models[0]]["tags"].items():
            cells = "".join(f"<td>{shown(by_model[model]['tags'][tag]['mean'])}</td>" for model in models)
            rows.append(f"<tr><td>{escape(tag)}</td><td>{of_student['n']:,}</td>{cells}</tr>")
        cells = "".join(f"<td>{shown(by_model[model]['overall'])}</td>" for model in models)
        rows.append(f'<tr class="total"><td>overall: mean of the tasks</td><td></td>{cells}</tr>')
        state = " open" if metric == deciding(scorecard) else ""
        name = figure_name(scorecard, metric)
        parts.append(f"<details{state}><summary>{name}</summary>{table(head, rows)}</details>")
    return "".join(parts)


def images(scorecard: dict, rows: list[Row]) -> str:
    """Rows of prompts, columns of models; under each image what the metrics say of it."""
    lines = []
    for row in rows:
        tag = f" <small>{escape(row.tag)}</small>" if row.tag else ""
        lines.append(f'<tr><td class="prompt" colspan="{len(scorecard["models"])}">{escape(row.prompt)}{tag}</td></tr>')
        cells = []
        for model in scorecard["models"]:
            picture = tile(row.images[model["name"]])
            tiny = ' class="tiny"' if max(row.images[model["name"]].shape) < picture.width else ""
            data = base64.b64encode(png(picture)).decode("ascii")
            text = escape(f"{model['name']}: {row.prompt}", quote=True)
            notes = row.notes[model["name"]].split(", ")
            note = ", ".join(f'<span class="whole">{escape(each)}</span>' for each in notes)
            cells.append(f'<td><img{tiny} src="data:image/png;base64,{data}" alt="{text}"><small>{note}</small></td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(map(heading, scorecard["models"]))
    return table(head, lines).replace("<table>", '<table class="images">', 1)


def plain(rows: list[tuple[str, str]]) -> str:
    """Names and values."""
    lines = "".join(f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="plain"><tbody>{lines}</tbody></table></div>'
