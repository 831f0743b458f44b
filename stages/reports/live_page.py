"""The live page of a run: stages, time left, cost, alarms, strips over time with a slider, and curves, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from stages.reports.charts import Chart, build_charts, collect_columns
from stages.reports.film import Film, build_film
from stages.reports.page import GLANCE
from stages.reports.pictures import Picture, describe_image, embed_image
from stages.reports.rendering import render_template
from stages.reports.running import BAD, RunView, StageRow, build_stage_row, describe_run

FRAMES = 24  # of the slider
SIDE = 192  # pixels of its images
LATER = ("real", "fake")


@dataclass(frozen=True)
class ScoreRow:
    """What the two scores make of the newest images: x0, x0_real and x0_fake of each prompt."""

    prompt: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class LivePage:
    """The whole page. refresh: seconds until the browser loads it again; 0: never. charts: as in a report."""

    title: str
    lead: str
    is_bad: bool
    written: str
    refresh: int
    stages: Sequence[StageRow]
    cost: str
    alarms: Sequence[tuple[str, str]]
    films: Sequence[Film]
    scores: Sequence[ScoreRow]
    scores_of: str
    curves_of: Sequence[tuple[int, str]]
    glance: Sequence[Chart]
    charts: Sequence[Chart]


def render_live_page(view: RunView, *, refresh: int) -> str:
    """The page as HTML. refresh: seconds between two writes of it, while the run goes on."""
    trained = [stage for stage in view.stages if stage.rows]
    columns: Mapping[str, object] = {stage.name: collect_columns(stage.rows) for stage in trained}
    charts = build_charts(columns)  # type: ignore[arg-type]  # they are columns of points
    films = [build_film(each.reader, each.series, frames=FRAMES, rows=24, side=SIDE) for each in view.stages]
    scores_of, scores = list_scores(view)
    page = LivePage(
        title=f"{view.run}: {'finished' if view.is_finished else 'live'}",
        lead=describe_run(view),
        is_bad=any(stage.state in BAD for stage in view.stages),
        written=datetime.fromtimestamp(view.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        refresh=0 if view.is_finished else refresh,
        stages=[build_stage_row(stage) for stage in view.stages],
        cost=view.cost_text,
        alarms=[(stage.label, alarm.line) for stage, alarm in reversed(view.alarms)],
        films=[film for film in reversed(films) if film is not None],
        scores=scores,
        scores_of=scores_of,
        curves_of=list(enumerate(stage.name for stage in trained)),
        glance=charts[:GLANCE],
        charts=charts[GLANCE:],
    )
    return render_template("live.html.jinja", page=page)


def list_scores(view: RunView) -> tuple[str, list[ScoreRow]]:
    """The newest images of the scores, of the stage that shows some, and where they are from."""
    for stage in reversed(view.stages):
        for update in reversed(stage.series.strips):
            images = [stage.reader.read_strip(update, kind) for kind in ("update", *LATER)]
            if all(images):
                names = ("x0", "x0_real", "x0_fake")
                rows = [
                    ScoreRow(
                        prompt,
                        tuple(
                            embed_image(of[place], describe_image(name, prompt), SIDE)
                            for name, of in zip(names, images, strict=True)
                        ),
                    )
                    for place, prompt in enumerate(stage.series.prompts)
                ]
                return f"{stage.label}, update {update:,}", rows
    return "", []
