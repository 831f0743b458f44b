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
from stages.reports.running import RunView, StageView
from stages.reports.stage_times import format_duration

FRAMES = 24  # of the slider
SIDE = 192  # pixels of its images
STATES = {"silent": "no sign of it", "open": "begun"}  # words for states that need some
BAD = ("silent", "failed")
LATER = ("real", "fake")


@dataclass(frozen=True)
class StageRow:
    """A stage in the table. share: percent done, None where there is no bar."""

    label: str
    state: str
    share: float | None
    progress: str
    pace: str
    duration: str
    effort: str
    memory: str
    is_bad: bool


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


def describe_run(view: RunView) -> str:
    """Where the run is, in a sentence."""
    if view.is_finished:
        return "All stages are sealed; the report has the scorecard."
    stage = view.current
    if stage is None:
        sealed = [each.label for each in view.stages if each.state == "sealed"]
        return f"No stage runs. Sealed: {', '.join(sealed) or 'none'}."
    where = f"{stage.label}"
    if stage.progress is not None:
        where += f", update {stage.progress[0]:,} of {stage.progress[1]:,}"
    if stage.state == "stopped":
        return f"Stopped in {where}, after a checkpoint. The same command goes on."
    if stage.state == "failed":
        return f"Failed in {where}. Its last line says why; the last checkpoint is whole."
    if stage.state == "silent" and stage.series.status is not None:
        since = format_duration(view.at - stage.series.status.at)
        return f"No sign of {where} for {since}: it may have died, or its machine cannot reach the store."
    left = f"; {view.left_text}" if view.left_text else ""
    return f"Now: {where}{left}."


def build_stage_row(stage: StageView) -> StageRow:
    """A stage in the table."""
    status, progress = stage.series.status if stage.is_open else None, stage.progress
    memory = ""
    if status is not None:
        memory = ", ".join(describe_gpu(gpu.used_mib, gpu.total_mib, gpu.busy) for gpu in status.gpus)
        memory = memory or f"{status.memory_mib / 1024:.1f} GiB of main memory"
    return StageRow(
        label=stage.label,
        state=STATES.get(stage.state, stage.state),
        share=None if progress is None or not progress[1] else round(100 * progress[0] / progress[1], 1),
        progress="" if progress is None else f"{progress[0]:,} of {progress[1]:,}",
        pace="" if status is None or status.pace_s is None else f"{status.pace_s:.3g} s",
        duration=stage.duration_text,
        effort=stage.effort_text,
        memory=memory,
        is_bad=stage.state in BAD,
    )


def describe_gpu(used_mib: float, total_mib: float, busy: float) -> str:
    return f"GPU {busy:.0f} % busy, {used_mib / 1024:.0f} of {total_mib / 1024:.0f} GiB"


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
