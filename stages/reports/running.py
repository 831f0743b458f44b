"""What is known of a run while it runs, and after: its stages, curves, alarms, strips, time left and cost. No torch.

Sealed stages are told by their records, open ones by what they show in live/.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dmdr.config.stages import STAGES, TRAINING_STAGES, StageName, list_stages
from dmdr.errors import USER_ERRORS
from stages.live.layout import AlarmLine
from stages.live.read import LiveReader, Row, Series
from stages.reports.run_cost import RunCost, find_cost, find_open_cost, format_spent
from stages.reports.stage_times import format_duration
from stages.store.artifacts import Artifact
from stages.store.records import Record

METRICS = "metrics.jsonl"
STATES = {"silent": "no sign of it", "open": "begun"}  # words for states that need some
BAD = ("silent", "failed")
SILENCE = 300.0  # seconds without a sign of a stage, and ten updates: then it may have died


@dataclass(frozen=True)
class StageView:
    """One stage. state: sealed, running, silent, stopped, failed, open or not started. rows: of its metrics.

    series: what it shows in live/. seconds: that it took, or has taken so far. reader: of its strips.
    """

    name: StageName
    state: str
    series: Series
    rows: tuple[Row, ...]
    seconds: float | None
    cost: RunCost
    reader: LiveReader

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    @property
    def is_open(self) -> bool:
        return self.state in ("running", "silent", "stopped", "failed", "open")

    @property
    def progress(self) -> tuple[int, int] | None:
        """Updates done, and all; None where that is not known."""
        status = self.series.status
        return None if status is None or not self.is_open else (status.step, status.steps)

    @property
    def duration_text(self) -> str:
        return "" if self.seconds is None else format_duration(self.seconds)

    @property
    def effort_text(self) -> str:
        return format_spent(self.cost.spent)


@dataclass(frozen=True)
class RunView:
    """A run. at: seconds since 1970, of this view."""

    run: str
    store: str
    stages: tuple[StageView, ...]
    at: float

    @property
    def current(self) -> StageView | None:
        """The stage that is open, if one is."""
        return next((stage for stage in reversed(self.stages) if stage.is_open), None)

    @property
    def is_finished(self) -> bool:
        return all(stage.state == "sealed" for stage in self.stages)

    @property
    def alarms(self) -> tuple[tuple[StageView, AlarmLine], ...]:
        return tuple((stage, alarm) for stage in self.stages for alarm in stage.series.alarms)

    @property
    def left_text(self) -> str:
        """How long the run will take, as far as its stage knows; empty where nobody does."""
        status = None if self.current is None else self.current.series.status
        if status is None or self.current is None or self.current.state != "running" or status.left_run_s is None:
            return ""
        left = max(0.0, status.left_run_s - max(0.0, self.at - status.at))
        return f"{format_duration(left)} left for the run"

    @property
    def cost_text(self) -> str:
        """What it has cost: "3.2 GPU-hours, 8.10 EUR"."""
        return sum((stage.cost for stage in self.stages), RunCost()).describe()


class RunReader:
    """Reads a run again and again. now: seconds since 1970."""

    def __init__(self, store: str, run: str, now: Callable[[], float] = time.time) -> None:
        self.store, self.run, self.now = store, run, now
        self._readers = {stage: LiveReader(store, run, stage) for stage in STAGES}
        self._sealed: dict[StageName, StageView] = {}

    def read(self) -> RunView:
        """The run as it is now.

        Raises:
            StoreError, ConfigError, InputMissing, DataError: the store does not answer, or a record is damaged.
        """
        joint = Artifact(self.store, self.run, "joint").read_claim()
        names = list_stages(cold_start=joint is None or "cold_start" in joint.inputs)
        return RunView(self.run, self.store, tuple(self._read_stage(name) for name in names), self.now())

    def _read_stage(self, name: StageName) -> StageView:
        if name in self._sealed:
            return self._sealed[name]
        artifact = Artifact(self.store, self.run, name)
        record, reader = artifact.record(), self._readers[name]
        series = reader.read() if name in TRAINING_STAGES else Series()
        if record is not None:
            self._sealed[name] = self._view_sealed(name, record, series, artifact)
            return self._sealed[name]
        status, state = series.status, "not started"
        if artifact.read_claim() is not None:
            state = "open"
            if status is not None:
                patience = SILENCE + 10 * (status.pace_s or 0)
                is_silent = status.state == "running" and self.now() - status.at > patience
                state = "silent" if is_silent else "running" if status.state == "finished" else status.state
        seconds = None if status is None else status.at - status.began
        cost = find_open_cost(artifact, status) if name in TRAINING_STAGES else RunCost()
        return StageView(name, state, series, series.rows, seconds, cost, reader)

    def _view_sealed(self, name: StageName, record: Record, series: Series, artifact: Artifact) -> StageView:
        rows = read_metrics(artifact) if METRICS in record.files else ()
        seconds = record.provenance.duration_s
        return StageView(name, "sealed", series, rows, seconds, find_cost(record), self._readers[name])


def read_metrics(artifact: Artifact) -> tuple[Row, ...]:
    """The metrics rows of a sealed training stage, verified."""
    with tempfile.TemporaryDirectory() as cache:
        folder = artifact.fetch(Path(cache), lambda name: name == METRICS)
        return tuple(json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines())


def read_series(store: str, run: str, stage: str) -> tuple[LiveReader, Series] | None:
    """live/ of a stage; None where it cannot be read, which is no harm."""
    with suppress(*USER_ERRORS):
        reader = LiveReader(store, run, stage)
        return reader, reader.read()
    return None


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
    recovered = "" if status is None or not status.recoveries else f", recovered {format_times(status.recoveries)}"
    return StageRow(
        label=stage.label,
        state=f"{STATES.get(stage.state, stage.state)}{recovered}",
        share=None if progress is None or not progress[1] else round(100 * progress[0] / progress[1], 1),
        progress="" if progress is None else f"{progress[0]:,} of {progress[1]:,}",
        pace="" if status is None or status.pace_s is None else f"{status.pace_s:.3g} s",
        duration=stage.duration_text,
        effort=stage.effort_text,
        memory=memory,
        is_bad=stage.state in BAD,
    )


def format_times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def describe_gpu(used_mib: float, total_mib: float, busy: float) -> str:
    return f"GPU {busy:.0f} % busy, {used_mib / 1024:.0f} of {total_mib / 1024:.0f} GiB"
