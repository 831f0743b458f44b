"""One HTML file for a table: claims, our figures beside the paper's, curves, images, and the runs behind them.

Here its content is computed; templates/table.html.jinja shows it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from stages.reports.charts import Chart, Curve, build_chart, thin
from stages.reports.pictures import Picture, embed_tile
from stages.reports.rendering import render_template
from stages.reports.style import COLOURS
from stages.reports.tables.claims import Claims, build_claims
from stages.reports.tables.figures import Figures, build_figures
from stages.reports.tables.judgement import Judgement, judge_claims, select_row
from stages.reports.tables.plan import Run
from stages.reports.tables.results import FinishedRun, read_results
from stages.reports.tables.spec import Curves, Row, Spec, Variant

SHOWN = 6  # prompts with images


@dataclass(frozen=True)
class CurveChart:
    """A column of metrics.jsonl; chart: None where no run has it yet."""

    column: str
    chart: Chart | None


@dataclass(frozen=True)
class CurveSection:
    """The charts of one stage. rows: (number of the colour, label)."""

    stage: str
    variant: Variant | None
    rows: tuple[tuple[int, str], ...]
    charts: tuple[CurveChart, ...]


@dataclass(frozen=True)
class ImageColumn:
    """A row of the table as a column of images."""

    label: str
    variant: Variant | None


@dataclass(frozen=True)
class PromptImages:
    """The images of one prompt, column by column."""

    prompt: str
    cells: tuple[tuple[Picture, ...], ...]


@dataclass(frozen=True)
class ImageSection:
    """Images of the same prompts and the same noise. seeds: of the runs that drew them."""

    columns: tuple[ImageColumn, ...]
    prompts: tuple[PromptImages, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class TablePage:
    """The whole page.

    prompts: how many each run was judged on. finished: how many runs are. runs: (name, how it was made).
    command: the shell command that makes the page again.
    """

    title: str
    teacher: str
    seeds: tuple[int, ...]
    prompts: int
    finished: int
    note: str
    claims: Claims | None
    figures: Figures
    curves: CurveSection | None
    images: ImageSection | None
    runs: tuple[tuple[str, str], ...]
    command: str


def write_table_page(spec: Spec, runs: list[Run], store: str, out: Path, command: str) -> list[Judgement]:
    """Read what is sealed and write the page. Returns the judgements.

    Raises:
        DataError, ConfigError: as stages.reports.tables.results.
    """
    with tempfile.TemporaryDirectory() as cache:
        finished = read_results(runs, store, spec.curves, Path(cache))
        judgements = judge_claims(spec, finished)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render_page(spec, runs, finished, judgements, command=command), encoding="utf-8")
    return judgements


def render_page(
    spec: Spec, runs: list[Run], finished: list[FinishedRun], judgements: list[Judgement], *, command: str
) -> str:
    """The page as HTML."""
    page = TablePage(
        title=f"{spec.table}: {spec.title}",
        teacher=runs[0].config.teacher.path,
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        prompts=max((len(scores) for each in finished for scores in each.scores.values()), default=0),
        finished=len(finished),
        note=spec.note,
        claims=build_claims(judgements) if judgements else None,
        figures=build_figures(spec, finished),
        curves=None if spec.curves is None else build_curves(spec, spec.curves, finished),
        images=build_images(spec, finished),
        runs=list_runs(runs, finished),
        command=command,
    )
    return render_template("table.html.jinja", page=page)


def build_curves(spec: Spec, curves: Curves, finished: list[FinishedRun]) -> CurveSection:
    """A chart for each column, of the last variant: every seed of every row is a curve, and a row has one colour."""
    variant = spec.all_variants[-1]
    by_row = [(row.label, list(select_row(finished, row.name, variant).values())) for row in spec.rows]
    drawn = [(label, runs) for label, runs in by_row if any(run.curves for run in runs)]
    charts = []
    for column in curves.columns:
        lines = [
            Curve(thin(run.curves[column]), number % len(COLOURS))
            for number, (_, runs) in enumerate(drawn)
            for run in runs
            if column in run.curves
        ]
        end = max((line.points[-1].update for line in lines), default=0)
        chart = build_chart(column, lines, end=end, shows_last=False) if lines else None
        charts.append(CurveChart(column, chart))
    colours = tuple((number % len(COLOURS), label) for number, (label, _) in enumerate(drawn))
    return CurveSection(curves.stage, variant, colours, tuple(charts))


def build_images(spec: Spec, finished: list[FinishedRun]) -> ImageSection | None:
    """Rows of the table side by side, each by the least seed that is finished; None where no run is."""
    columns: list[tuple[Row, Variant | None, FinishedRun]] = []
    for row in spec.rows:
        for variant in spec.all_variants:
            runs = select_row(finished, row.name, variant)
            if runs:
                columns.append((row, variant, runs[min(runs)]))
    if not columns:
        return None
    _, _, first = columns[0]
    return ImageSection(
        tuple(ImageColumn(row.label, variant) for row, variant, _ in columns),
        tuple(
            PromptImages(prompt, tuple(_embed_images(run, row, prompt) for row, _, run in columns))
            for prompt in list(first.images)[:SHOWN]
        ),
        tuple(sorted({run.run.seed for _, _, run in columns})),
    )


def _embed_images(run: FinishedRun, row: Row, prompt: str) -> tuple[Picture, ...]:
    return tuple(embed_tile(image, f"{row.label}: {prompt}") for image in run.images[prompt])


def list_runs(runs: list[Run], finished: list[FinishedRun]) -> tuple[tuple[str, str], ...]:
    """Each run's name, with how it was made, or that it is not finished."""
    by_name = {each.run.name: describe_run(each) for each in finished}
    return tuple((run.name, by_name.get(run.name, "not finished")) for run in runs)


def describe_run(finished: FinishedRun) -> str:
    """How long each stage took, or from which run it was adopted; then device, version and fingerprint."""
    by_stage = {stage: record.provenance for stage, record in finished.records.items()}
    stages = [f"{stage} {made.duration_s:.0f} s" for stage, made in by_stage.items() if made.adopted_from is None]
    stages += [f"{stage} from {made.adopted_from}" for stage, made in by_stage.items() if made.adopted_from is not None]
    evaluation = finished.records["evaluate"]
    made = evaluation.provenance
    return f"{', '.join(stages)}; {made.device}, dmdr {made.code['version']}, {evaluation.fingerprint[:12]}"
