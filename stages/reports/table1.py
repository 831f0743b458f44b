"""The scorecard in the shape of the paper's Table 1: models by metrics, with the paper's own rows for reference.

templates/scorecard.html.jinja shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard, Scorecard, Speed, Spread
from stages.reports.numbers import format_count
from stages.reports.paper import TABLES, find_rows
from stages.reports.verdict import format_number

GENEVAL = "geneval"
OFFICIAL = "(official)"  # ends the figures that a benchmark's own script counts


@dataclass(frozen=True)
class Heading:
    """A metric's column. prompts: how many it judges."""

    metric: str
    trained_on: bool
    prompts: int


@dataclass(frozen=True)
class Cell:
    """A mean, or None where it is not a number. notes: small lines below it."""

    mean: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelLine:
    """One model. conditions: its guidance, and its own name where the label is another.

    seconds: for one image, None where they were not measured; spread: of these. cells: None where the metric did not
    judge the model.
    """

    label: str
    conditions: str
    steps: int
    nfe: int
    seconds: float | None
    spread: Spread | None
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class PaperLine:
    """A row that the paper prints; cells: None under a metric that the paper does not have."""

    label: str
    steps: int
    nfe: int
    cells: tuple[str | None, ...]


@dataclass(frozen=True)
class PaperRows:
    """The paper's rows for a base model, and the tables of the paper that they are from."""

    base: str
    tables: tuple[str, ...]
    lines: tuple[PaperLine, ...]


@dataclass(frozen=True)
class Table1:
    """The whole table."""

    headings: tuple[Heading, ...]
    lines: tuple[ModelLine, ...]
    paper: PaperRows | None


@dataclass(frozen=True)
class Notes:
    """What the text below the table depends on.

    has_trained_on: whether a model was trained on a metric. is_timed_warm: whether the times have a spread.
    truncated: evaluation prompts that are longer than the text encoder reads.
    """

    has_trained_on: bool
    is_timed_warm: bool
    has_tasks: bool
    has_official: bool
    images_per_prompt: int
    batch_size: int
    device: str
    truncated: int


def list_figures(card: Figures) -> list[str]:
    """The names of a card's figures, in their order."""
    return list(dict.fromkeys(row.name for row in card.metrics))


def is_trained_on(card: Figures, figure: str) -> bool:
    """Whether a compared model was trained to raise this figure."""
    return any(row.trained_on for row in card.metrics if row.name == figure)


def build_table1(
    card: Figures, seconds_per_image: Mapping[str, float | None], spread: Mapping[str, Spread], *, base: str | None
) -> Table1:
    """Models by metrics; then the paper's rows, where it has rows of this base and a metric of ours.

    seconds_per_image, spread: by model. base: the teacher as the paper calls it.
    """
    figures = list_figures(card)
    rows = {(row.name, row.model): row for row in card.metrics}
    headings = (
        Heading(figure, is_trained_on(card, figure), max(row.n for row in card.metrics if row.name == figure))
        for figure in figures
    )
    lines = (
        ModelLine(
            model.label,
            _describe_conditions(model),
            model.steps,
            model.nfe,
            seconds_per_image[model.name],
            spread.get(model.name),
            tuple(_build_cell(card, rows.get((figure, model.name))) for figure in figures),
        )
        for model in card.models
    )
    return Table1(tuple(headings), tuple(lines), _build_paper_rows(card, figures, base))


def _describe_conditions(model: ModelOnCard) -> str:
    guidance = f"CFG {model.guidance_scale:g}" if model.guidance_scale > 1 else "no CFG"
    return guidance if model.label == model.name else f"{model.name}, {guidance}"


def _build_cell(card: Figures, row: MetricRow | None) -> Cell | None:
    if row is None:
        return None
    if row.mean is None:
        return Cell(None, (f"{row.broken} of {format_count(row.n, 'prompt')}",))
    notes = [f"{format_number(row.low)} to {format_number(row.high)}"]
    by_task = _find_overall(card, row.name, row.model)
    if by_task is not None and row.name.startswith(GENEVAL):
        notes.append(f"by task {format_number(by_task)}")
    official = _find_overall(card, f"{row.name} {OFFICIAL}", row.model)
    if official is not None:
        notes.append(f"official {format_number(official)}")
    return Cell(row.mean, tuple(notes))


def _find_overall(card: Figures, figure: str, model: str) -> float | None:
    means = card.tags.get(figure, {}).get(model)
    return means.overall if means else None


def _build_paper_rows(card: Figures, figures: list[str], base: str | None) -> PaperRows | None:
    """None where the paper has none of these metrics for this base."""
    rows = find_rows(base, figures, card.about)
    if base is None or not rows:
        return None
    metrics = {metric for row, _ in rows for metric in row.figures}
    tables = {TABLES[metric] for metric in metrics if any(figure.startswith(metric) for figure in figures)}
    lines = (
        PaperLine(row.label, row.steps, row.nfe, tuple(cells.get(figure) for figure in figures)) for row, cells in rows
    )
    return PaperRows(base, tuple(sorted(tables)), tuple(lines))


def build_notes(card: Scorecard, speed: Speed) -> Notes:
    """What has to be said below the table."""
    return Notes(
        has_trained_on=any(row.trained_on for row in card.metrics),
        is_timed_warm=bool(speed.spread),
        has_tasks=any(figure.startswith(GENEVAL) for figure in card.tags),
        has_official=any(figure.endswith(OFFICIAL) for figure in card.tags),
        images_per_prompt=card.images_per_prompt,
        batch_size=speed.batch_size,
        device=speed.device,
        truncated=card.truncated,
    )


def describe_metrics(card: Figures) -> list[tuple[str, str]]:
    """Each metric's name, with its weights, its scale and whatever else the card says about it."""
    return [
        (figure, ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
        for figure, facts in card.about.items()
    ]
