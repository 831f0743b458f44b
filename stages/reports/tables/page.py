"""One HTML file for a table: claims, our figures beside the paper's, curves, images, and the runs behind them."""

from __future__ import annotations

import base64
import math
import tempfile
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

from dmdr.metrics.intervals import Interval
from stages.reports.charts import render_chart, thin
from stages.reports.gallery import build_tile, encode_png
from stages.reports.html import (
    DIVERSITY,
    MARK,
    format_count,
    format_figure,
    render_document,
    render_plain_table,
    render_table,
)
from stages.reports.style import COLOURS
from stages.reports.tables.judgement import (
    FAILS,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    Judgement,
    judge_claims,
    mean_over_seeds,
    select_row,
)
from stages.reports.tables.plan import Run
from stages.reports.tables.results import Found, read_results
from stages.reports.tables.spec import Row, Spec, paper_numbers
from stages.reports.tables.style import DIRECTION, HOW, MORE_STYLE, TRAINED_ON
from stages.reports.verdict import format_number, is_diversity

SHOWN = 6  # prompts with images


def write_table_page(spec: Spec, runs: list[Run], store: str, out: Path, command: str) -> list[Judgement]:
    """Read what is sealed and write the page; returns the judgements.

    Raises:
        DataError, ConfigError: as stages.reports.tables.results.
    """
    with tempfile.TemporaryDirectory() as cache:
        found = read_results(runs, store, spec.curves, Path(cache))
        judged = judge_claims(spec, found)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render_page(spec, runs, found, judged, command=command), encoding="utf-8")
    return judged


def render_page(spec: Spec, runs: list[Run], found: list[Found], judged: list[Judgement], *, command: str) -> str:
    """The whole page; every text in it is escaped."""
    title = f"{spec.table}: {spec.title}"
    teacher, seeds = runs[0].config.teacher.path, list(dict.fromkeys(run.seed for run in runs))
    prompts = max((len(values) for each in found for values in each.scores.values()), default=0)
    summary = (
        f"Teacher {escape(teacher)}, {format_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), "
        f"{prompts:,} evaluation prompts; {len(found)} of {format_count(len(runs), 'run')} finished."
    )
    body = [f"<h1>{escape(title)}</h1>", f'<p class="faint">{summary}</p>']
    body += [f"<p>{escape(spec.note)}</p>"] if spec.note else []
    body += ["<h2>The paper's claims, here</h2>", render_claims(judged)] if judged else []
    body += ["<h2>Figures</h2>", render_figures(spec, found)]
    if spec.curves:
        body += ["<h2>Curves</h2>", render_curves(spec, found)]
    body += ["<h2>Images</h2>", render_images(spec, found), "<h2>Runs</h2>", render_provenance(runs, found)]
    body.append(f"<p><small>This page and every run that is not sealed yet: <code>{escape(command)}</code></small></p>")
    return render_document(title, body, MORE_STYLE)


def render_claims(judged: list[Judgement]) -> str:
    """A sentence each, under what the paper says."""
    parts, said = [], None
    for each in judged:
        if each.claim.claim != said:
            said = each.claim.claim
            parts.append(f"<h3>{escape(said)}</h3>")
        kind = {HOLDS: "better", FAILS: "worse"}.get(each.word, "")
        before, after = format_judgement(each).split(each.word, 1)
        mark = f" {MARK}" if each.trained_on else ""
        parts.append(f'<p class="card {kind}">{escape(before)}<b>{escape(each.word)}</b>{escape(after)}{mark}</p>')
    words = Counter(each.word for each in judged)
    summary = ", ".join(f"{each} {words[each]}" for each in (HOLDS, FAILS, UNDECIDED, NOT_RUN) if words[each])
    heading = f'<p class="faint">{format_count(len(judged), "judgement")}: {summary}.</p>'
    return f'<div class="claims">{heading}{"".join(parts)}</div>'


def format_judgement(judgement: Judgement) -> str:
    """One judgement as a plain sentence."""
    at = f" at {judgement.variant.label}" if judgement.variant else ""
    of = "on" if judgement.claim.of == "scores" else "by the mean over training of"
    text = f"{of.capitalize()} {judgement.figure}{at}: {judgement.word}"
    if judgement.difference is not None and judgement.means is not None:
        mean, low, high = judgement.difference
        (a, b), (higher, lower) = judgement.means, judgement.labels
        if math.isinf(low):
            ends = "one seed has no interval"
        elif math.isnan(mean):
            ends = "a score is not a number"
        else:
            interval = f"{format_number(low, '+')} to {format_number(high, '+')}"
            ends = f"difference {format_number(mean, '+')}, 95 % interval {interval}"
        over = format_count(judgement.seeds, "seed") + (
            f" and {format_count(judgement.prompts, 'prompt')}" * bool(judgement.prompts)
        )
        text += f"; {higher} {format_number(a)}, {lower} {format_number(b)}: {ends}, over {over}"
    paper = ", ".join(f"{column} {value:+.4f}" for column, value in judgement.paper.items())
    return f"{text}. In the paper: {paper}." if paper else f"{text}."


def render_figures(spec: Spec, found: list[Found]) -> str:
    """Rows by metrics, ours first and the paper's beside them."""
    variants = spec.variants or (None,)
    columns, papers = len(spec.columns), len(spec.paper_columns)
    head = "<td></td>" + "".join(
        f'<th class="group" colspan="{columns}">ours{_at(variant.label if variant else "")}</th>'
        for variant in variants
    )
    if papers:
        head += "".join(
            f'<th class="group paper" colspan="{papers}">the paper{_at(variant.paper if variant else "")}</th>'
            for variant in variants
        )
    names = [
        f'<th class="{"first" * (n == 0)}">{escape(column.metric)}<small>{escape(column.label)}</small></th>'
        for _ in variants
        for n, column in enumerate(spec.columns)
    ]
    names += [
        f'<th class="paper {"first" * (n == 0)}">{escape(column)}</th>'
        for _ in variants
        for n, column in enumerate(spec.paper_columns)
    ]
    rows = [f"<tr><td>{escape(row.label)}{_of_model(row)}</td>{_cells(spec, row, found)}</tr>" for row in spec.rows]
    trained_on = any(column.metric in each.trained_on for column in spec.columns for each in found)
    note = HOW + f" {MARK}: {TRAINED_ON}" * trained_on
    note += f" {DIRECTION}" if papers else ""
    note += f" {DIVERSITY}" if any(is_diversity(column.metric) for column in spec.columns) else ""
    return (
        render_table(f"{head}</tr><tr><th>row</th>{''.join(names)}", rows, name="Figures")
        + f"<p><small>{note}</small></p>"
    )


def _at(label: str) -> str:
    return f", {escape(label)}" if label else ""


def _of_model(row: Row) -> str:
    return "<small>not run here</small>" if row.model == "none" else f"<small>{escape(row.model)}</small>"


def _cells(spec: Spec, row: Row, found: list[Found]) -> str:
    cells = []
    for variant in spec.variants or (None,):
        runs = select_row(found, row.name, variant)
        for n, column in enumerate(spec.columns):
            cell = _cell(mean_over_seeds(found, row.name, variant, column.metric))
            trained_on = any(column.metric in each.trained_on for each in runs.values())
            seeds = f"<small>{format_count(len(runs), 'seed')}</small>" * bool(runs)
            cells.append(f'<td class="{"first" * (n == 0)}">{cell}{seeds * (n == 0)}{MARK * trained_on}</td>')
    for variant in spec.variants or (None,):
        paper = paper_numbers(row, variant)
        for n, name in enumerate(spec.paper_columns):
            value = f"{paper[name]:.4f}" if name in paper else ""
            cells.append(f'<td class="paper {"first" * (n == 0)}">{value}</td>')
    return "".join(cells)


def _cell(found: Interval | None) -> str:
    if found is None:
        return '<span class="faint">–</span>'
    if math.isnan(found.mean):
        return format_figure(None)
    return f"{format_number(found.mean)}<small>{format_number(found.low)} to {format_number(found.high)}</small>"


def render_curves(spec: Spec, found: list[Found]) -> str:
    """A chart a column: every seed of every row is a line, the rows by colour."""
    assert spec.curves is not None
    variant = spec.variants[-1] if spec.variants else None
    rows = [row for row in spec.rows if any(each.curves for each in select_row(found, row.name, variant).values())]
    charts = []
    for column in spec.curves.columns:
        lines, colours = [], []
        for colour, row in enumerate(rows):
            for seed, each in select_row(found, row.name, variant).items():
                if column in each.curves:
                    lines.append((f"{row.label}, seed {seed}", 0.0, thin(each.curves[column])))
                    colours.append(colour % len(COLOURS))
        if lines:
            end = max(points[-1][0] for _, _, points in lines)
            charts.append(render_chart(column, lines, end, colours=colours))
        else:
            charts.append(f"<figure><figcaption><b>{escape(column)}</b>in no run yet</figcaption></figure>")
    key = "".join(f'<span><i class="k{n % len(COLOURS)}"></i>{escape(row.label)}</span>' for n, row in enumerate(rows))
    where = f"Stage {spec.curves.stage}{_at(variant.label if variant else '')}, by student update; a line is a seed."
    return f'<p class="faint">{where}</p><p class="key">{key}</p><div class="charts">{"".join(charts)}</div>'


def render_images(spec: Spec, found: list[Found]) -> str:
    """Rows of the table side by side on the same prompts and the same noise, of the first seed that they have."""
    columns = []
    for row in spec.rows:
        for variant in spec.variants or (None,):
            runs = select_row(found, row.name, variant)
            if runs:
                columns.append((row, variant, runs[min(runs)]))
    if not columns:
        return '<p class="faint">No run has them yet.</p>'
    seeds = sorted({each.run.seed for _, _, each in columns})
    head = "".join(
        f"<th>{escape(row.label)}<small>{escape(variant.label) if variant else ''}</small></th>"
        for row, variant, _ in columns
    )
    lines = []
    for prompt in list(columns[0][2].images)[:SHOWN]:
        lines.append(f'<tr><td class="prompt" colspan="{len(columns)}">{escape(prompt)}</td></tr>')
        lines.append(
            "<tr>" + "".join(_pictures(each.images[prompt], row, prompt) for row, _, each in columns) + "</tr>"
        )
    note = f'<p class="faint">Same prompts, same noise; seed {", ".join(map(str, seeds))}.</p>'
    return note + render_table(head, lines, name="Images", kind="images rows")


def _pictures(pictures: list[np.ndarray], row: Row, prompt: str) -> str:
    tags = []
    for image in pictures:
        picture = build_tile(image)
        tiny = ' class="tiny"' if max(image.shape) < picture.width else ""
        data = base64.b64encode(encode_png(picture)).decode("ascii")
        alt = escape(f"{row.label}: {prompt}", quote=True)
        tags.append(f'<img{tiny} src="data:image/png;base64,{data}" alt="{alt}"/>')
    return f'<td><div class="{"one" * (len(tags) == 1)}">{"".join(tags)}</div></td>'


def render_provenance(runs: list[Run], found: list[Found]) -> str:
    """A line a run: what made it, or that it is not there yet."""
    by_name = {each.run.name: each for each in found}
    return render_plain_table(
        [(run.name, _describe_run(by_name[run.name]) if run.name in by_name else "not finished") for run in runs],
        name="Runs",
    )


def _describe_run(found: Found) -> str:
    made = {stage: record.provenance for stage, record in found.records.items()}
    parts = [f"{stage} {how.duration_s:.0f} s" for stage, how in made.items() if how.adopted_from is None]
    parts += [f"{stage} from {how.adopted_from}" for stage, how in made.items() if how.adopted_from is not None]
    last = found.records["evaluate"]
    how = last.provenance
    return f"{', '.join(parts)}; {how.device}, dmdr {how.code['version']}, {last.fingerprint[:12]}"
