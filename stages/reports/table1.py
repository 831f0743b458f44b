"""The scorecard in the shape of the paper's Table 1: models by metrics, with the paper's own rows for a reference."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard, Scorecard, Speed
from stages.reports.html import DIVERSITY, MARK, format_count, format_figure, render_plain_table, render_scrolled
from stages.reports.paper import TABLES, find_rows
from stages.reports.verdict import deciding_metric, format_number

GENEVAL = "geneval"


def list_figures(card: Figures) -> list[str]:
    """The names of a card's figures, in their order."""
    return list(dict.fromkeys(each.name for each in card.metrics))


def figure_name(card: Figures, figure: str) -> str:
    """A figure's name with the sign that it was trained on."""
    trained_on = any(each.trained_on for each in card.metrics if each.name == figure)
    return f"{escape(figure)} {MARK}" if trained_on else escape(figure)


def render_scorecard(card: Scorecard, speed: Speed, base: str | None) -> str:
    """The table and what has to be said about it. base: the teacher as the paper calls it."""
    return (
        render_figures(card, speed.seconds_per_image, base)
        + f'<p class="faint"><small>{_render_notes(card, speed)}</small></p>'
        + render_missing(card)
        + render_descriptions(card)
    )


def render_figures(card: Figures, seconds_per_image: Mapping[str, float | None], base: str | None) -> str:
    """Models by metrics; then the paper's rows, where it has a row of this base and a metric of ours.

    seconds_per_image: by model.
    """
    figures = list_figures(card)
    rows = {(each.name, each.model): each for each in card.metrics}
    head = '<th scope="col">model</th><th scope="col">steps</th><th scope="col">NFE</th>'
    head += '<th scope="col">s / image<small>images / s</small></th>'
    for figure in figures:
        judged = max(each.n for each in card.metrics if each.name == figure)
        head += f'<th scope="col">{figure_name(card, figure)}<small>{format_count(judged, "prompt")}</small></th>'
    lines = []
    for model in card.models:
        cells = [_render_cell(card, rows.get((figure, model.name)), figure, model.name) for figure in figures]
        lines.append(f"<tr>{_heading(model)}{_format_speed(seconds_per_image[model.name])}{''.join(cells)}</tr>")
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>{_render_reference(card, figures, base)}"
    return render_scrolled(inside, name="Scorecard: models by metrics", kind="sticky")


def _heading(model: ModelOnCard) -> str:
    guidance = f"CFG {model.guidance_scale:g}" if model.guidance_scale > 1 else "no CFG"
    own = f"{escape(model.name)}, " if model.label != model.name else ""
    name = f'<th scope="row">{escape(model.label)}<small>{own}{guidance}</small></th>'
    return f"{name}<td>{model.steps}</td><td>{model.nfe}</td>"


def _render_cell(card: Figures, row: MetricRow | None, figure: str, model: str) -> str:
    if row is None:
        return "<td>–</td>"
    if row.mean is None:
        return f"<td>{format_figure(None)}<small>{row.broken} of {format_count(row.n, 'prompt')}</small></td>"
    under = f"<small>{format_number(row.low)} to {format_number(row.high)}</small>"
    overall = _find_overall(card, figure, model)
    if overall is not None and figure.startswith(GENEVAL):
        under += f"<small>by task {format_number(overall)}</small>"
    official = _find_overall(card, f"{figure} (official)", model)
    if official is not None:
        under += f"<small>official {format_number(official)}</small>"
    return f"<td>{format_number(row.mean)}{under}</td>"


def _find_overall(card: Figures, figure: str, model: str) -> float | None:
    means = card.tags.get(figure, {}).get(model)
    return means.overall if means else None


def _format_speed(seconds: float | None) -> str:
    return "<td>–</td>" if not seconds else f"<td>{seconds:.3g}<small>{1 / seconds:.3g}</small></td>"


def _render_reference(card: Figures, figures: list[str], base: str | None) -> str:
    """A second body with the paper's rows; empty where it has none of these metrics."""
    found = find_rows(base, figures, card.about)
    if not found:
        return ""
    metrics = dict.fromkeys(metric for row, _ in found for metric in row.figures)
    tables = sorted({TABLES[metric] for metric in metrics if any(each.startswith(metric) for each in figures)})
    where = ", ".join(tables)
    text = f"For reference, as printed in the paper for {base} ({where}); other prompts, so not to be ranked with ours"
    lines = [f'<tr><th class="source" scope="colgroup" colspan="{len(figures) + 4}"><span>{text}</span></th></tr>']
    for row, cells in found:
        values = "".join(f"<td>{cells[figure]}</td>" if figure in cells else "<td>–</td>" for figure in figures)
        lines.append(
            f'<tr class="reference"><th scope="row">paper: {escape(row.label)}</th><td>{row.steps}</td>'
            f"<td>{row.nfe}</td><td>–</td>{values}</tr>"
        )
    return f"<tbody>{''.join(lines)}</tbody>"


def _render_notes(card: Scorecard, speed: Speed) -> str:
    trained_on = any(each.trained_on for each in card.metrics)
    notes = [
        f"{MARK} The student was trained to raise this very number, so it proves little; the other metrics decide, "
        f"{escape(deciding_metric(card))} first."
        if trained_on
        else "The student was trained on none of these metrics.",
        "Higher is better everywhere. Below each mean: its 95 % interval over prompts.",
    ]
    if any(each.startswith(GENEVAL) for each in card.tags):
        notes.append("By task: the mean of the tasks, each counted once, which is what GenEval calls overall.")
    if any(each.endswith("(official)") for each in card.tags):
        notes.append(
            "Official: as DPG-Bench's own script counts, with its errors; the paper's numbers are of that kind."
        )
    if card.images_per_prompt > 1:
        notes.append(f"A prompt's score is the mean over its {card.images_per_prompt} images. {DIVERSITY}")
    notes.append("NFE: forwards of the network an image; guidance (CFG) doubles them, unless it is an input.")
    drawn = f"while drawing in batches of {speed.batch_size}, on {escape(speed.device)}"
    notes.append(f"Seconds an image: measured here {drawn}.")
    longer = card.truncated
    if longer:
        reads = (
            "is longer than the text encoder reads and was cut"
            if longer == 1
            else ("are longer than the text encoder reads and were cut")
        )
        notes.append(f"{longer:,} of all evaluation prompts {reads}, for every model.")
    else:
        notes.append("No evaluation prompt is longer than the text encoder reads.")
    return " ".join(notes)


def render_missing(card: Figures) -> str:
    """What was asked for and could not be measured."""
    lines = "".join(
        f'<p class="card missing"><b>Not measured: {escape(each.metric)}.</b> {escape(each.why)}</p>'
        for each in card.missing
    )
    return lines


def render_descriptions(card: Figures) -> str:
    """What each figure is: weights, scale, and whatever else the card says of it."""
    rows = []
    for figure, facts in card.about.items():
        told = [f"{name} {value}" for name, value in facts.items() if value is not None]
        rows.append((figure, ", ".join(told)))
    return f"<h3>What the metrics are</h3>{render_plain_table(rows, name='What the metrics are')}" if rows else ""
