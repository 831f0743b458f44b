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
