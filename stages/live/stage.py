"""Shows an open training stage while it runs: what `Session` calls between two updates.

Only the first rank writes; all ranks draw. Nothing here is waited for, but for the drawing itself and, once at the end
of the stage, LAST seconds. A `live` of null shows nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np

from dmdr import distributed
from dmdr.assembly.stage_config import StageConfig
from dmdr.config.run import Config
from dmdr.draws import Run
from dmdr.state import TrainState
from stages.live.layout import BLOCK, FAKE, REAL, STUDENT, AlarmLine, Status
from stages.live.machine import Machine, measure_peak_memory
from stages.live.strips import StripDrawer
from stages.live.trackers import TrackedStage, Tracking
from stages.live.writer import Writer
from stages.runtime.background import Background
from stages.runtime.context import Context
from stages.runtime.events import LIMIT, announce, build_alarm
from stages.runtime.ledger import count_money
from stages.store.layout import LIVE

LAST = 5.0  # seconds that the end of a stage waits for what is not written yet
PACE = 20  # updates over which the pace is measured


class LiveStage:
    """What one training stage shows. device: the kind that its ledger counts. later: see `Progress.expect`."""

    def __init__(
        self, context: Context, stage: StageConfig, run: Run, state: TrainState, *, device: str, later: float
    ) -> None:
        self.context, self.stage, self.run, self.state = context, stage, run, state
        self.device, self.later = device, later
        live = context.config.execution.live
        self._live, self._is_first = live, distributed.rank() == 0
        self._drawer = (
            None if live is None or live.strips_every is None else StripDrawer(context.config, live, stage, run)
        )
        self._before = find_stage_before(context.config, stage.name)
        self._began = time.time()
        self._ticks = [(state.step, time.monotonic())]  # (step, monotonic clock) of the last PACE updates
        self._machine = Machine()
        self._written = 0  # rows that have been handed over
        self._course = len(state.recoveries)  # how often the stage has gone back
        self._writer: Writer | None = None
        self._notices = Background("notify", context.progress.say)
        self._background: Background | None = None
        self._tracking: Tracking | None = None
        if live is not None and self._is_first:
            run_address = context.artifact.address.rpartition("/")[0]
            before = None if self._before is None else f"{run_address}/{self._before}/{LIVE}"
            self._writer = Writer(f"{context.artifact.address}/{LIVE}", live, before=before)
            self._background = Background("live page", context.progress.say)

    def __enter__(self) -> None:
        """Inside, an error is shown as the end of the stage."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.end("failed")

    def begin(self) -> None:
        """Show where the stage begins or goes on."""
        self._resume()
        if self._live is None:
            return
        if self.state.step == 0 and self._before is None:  # else what it drew then is looked for first
            self._draw_teacher()
        if self._drawer is not None:
            self._draw_if_due()

    def _resume(self) -> None:
        if self._live is None:
            return
        state = self.state
        if self._writer is not None:
            prompts = [] if self._drawer is None else self._drawer.list_prompts()
            rung = max((recovery.update for recovery in state.recoveries), default=0)
            self._put("resume", partial(self._writer.resume, list(state.rows), state.update, prompts, rung=rung))
            self._tracking = self._begin_tracking()
        self._written = len(state.rows)
        self._ticks = [(state.step, time.monotonic())]
        self._write_status("running")

    def record(self) -> None:
        """Show a finished update."""
        if self._live is None:
            return
        state = self.state
        self._ticks = [*self._ticks[-PACE:], (state.step, time.monotonic())]
        if self._writer is not None:
            self._writer.times[len(state.rows) - 1] = round(time.time(), 3)
        if self._tracking is not None:
            self._tracking.log(state.step, state.last_row)
        if state.step % self._live.metrics_every == 0:
            self._write_rows()
            self._write_status("running")
        if state.update:
            self._draw_if_due()

    def go_back(self) -> None:
        """Show that the watch has taken the stage back: what was shown of the course that it left goes.

        To its trackers it is a stage that is resumed.
        """
        self._course = len(self.state.recoveries)
        if self._tracking is not None:
            self._tracking.finish(is_finished=False)
        self._resume()

    def alarm(self, line: str) -> None:
        """Show an alarm, and tell the receivers of `execution.notify`."""
        config, say = self.context.config, self.context.progress.say
        if self._is_first and config.execution.notify:
            event = build_alarm(self.context.artifact, self.state.update, line)
            self._notices.put(event.key, lambda: announce(config, lambda: event, say))
        if self._writer is not None:
            alarm = AlarmLine(update=self.state.update, at=round(time.time(), 3), line=line)
            self._put(f"alarm {alarm.update} {line}", partial(self._writer.write_alarm, alarm), lasts=True)

    def end(self, status: str) -> None:
        """Show how the stage ends: finished, stopped or failed. Waits at most LAST seconds."""
        if self._live is not None:
            self._show_end(status)
        self._notices.end(LIMIT)

    def _show_end(self, status: str) -> None:
        assert self._live is not None, "else nothing is shown"
        self._write_rows()
        if status == "finished" and self._live.strips_every and self.state.update % self._live.strips_every:
            self._draw_student()
        self._write_status(status)
        if self._background is not None:
            self._background.end(LAST)
        if self._tracking is not None:
            self._tracking.finish(is_finished=status == "finished")

    def _draw_if_due(self) -> None:
        """A function of the update alone, so that all ranks agree. A teacher's strip that got lost is drawn anew."""
        if self._drawer is None or self._live is None or self.state.update % (self._live.strips_every or 1):
            return
        lacks_teacher = self._writer is not None and self._writer.has_teacher is False
        if self.state.step and distributed.any_rank(lacks_teacher):
            self._draw_teacher()
        self._draw_student()

    def _draw_teacher(self) -> None:
        if self._drawer is None:
            return
        images = self._drawer.draw_teacher()
        if self._writer is not None:
            self._put("teacher", partial(self._writer.write_teacher, images))
        if self._tracking is not None:
            self._tracking.show(self.state.step, "teacher", images, self._drawer.list_prompts())

    def _draw_student(self) -> None:
        if self._drawer is None:
            return
        drawn, update = self._drawer.draw_student(self.state), self.state.update
        for kind, images in {STUDENT: drawn.student, REAL: drawn.real, FAKE: drawn.fake}.items():
            if images is not None:
                self._write_strip(kind, update, images)
        if self._tracking is not None:
            self._tracking.show(self.state.step, "student", drawn.student, self._drawer.list_prompts())

    def _write_strip(self, kind: str, update: int, images: np.ndarray) -> None:
        if self._writer is not None:
            self._put(f"{kind} {update}", partial(self._writer.write_strip, kind, update, images))

    def _begin_tracking(self) -> Tracking | None:
        context = self.context
        execution, artifact = context.config.execution, context.artifact
        if not execution.trackers:
            return None
        stage = TrackedStage(
            run=artifact.run,
            stage=artifact.stage,
            address=artifact.address,
            step=self.state.step,
            settings=artifact.claimed().identity,
            folder=Path(execution.tracker_folder),
            recoveries=len(self.state.recoveries),
        )
        return Tracking(execution.trackers, stage, context.progress.say)

    def _write_rows(self) -> None:
        """Hand over the blocks that have new rows."""
        rows = self.state.rows
        if self._writer is not None and len(rows) > self._written:
            for number in range(self._written // BLOCK, (len(rows) - 1) // BLOCK + 1):
                block = rows[number * BLOCK : (number + 1) * BLOCK]
                self._put(f"rows {number}", partial(self._writer.write_block, number, block))
        self._written = len(rows)

    def _write_status(self, status: str) -> None:
        if self._writer is not None:
            self._put("status", partial(self._publish_status, self._describe(status)))

    def _publish_status(self, status: Status) -> None:
        assert self._writer is not None, "only the first rank has work in the background"
        self._writer.write_status(status.model_copy(update={"gpus": self._machine.read_gpus()}))

    def _describe(self, status: str) -> Status:
        """Where the stage is now."""
        state, updates, warmup = self.state, self.stage.training.updates, self.stage.fake_warmup
        config, spent = self.context.config, self.context.ledger.measure(self.device)
        (step, then), (last, now) = self._ticks[0], self._ticks[-1]
        pace = (now - then) / (last - step) if last > step else None
        left = warmup + updates - state.step
        money = count_money(config, spent)
        return Status(
            state=status,
            at=round(time.time(), 3),
            began=round(self._began, 3),
            step=state.step,
            steps=warmup + updates,
            update=state.update,
            updates=updates,
            recoveries=len(state.recoveries),
            pace_s=None if pace is None else round(pace, 4),
            left_s=None if pace is None else round(pace * left, 1),
            left_run_s=None if pace is None else round(pace * (left + self.later), 1),
            device=self.device,
            processes=distributed.ranks(),
            memory_mib=measure_peak_memory(),
            spent=spent,
            money=None if money is None else round(money, 6),
            currency=None if money is None or config.execution.price is None else config.execution.price.currency,
        )

    def _put(self, name: str, work: Callable[[], object], *, lasts: bool = False) -> None:
        """Have work done in the background. lasts: also if the stage goes back before; other work is then left out."""
        course = self._course

        def do() -> None:
            if lasts or course == self._course:
                work()

        if self._background is not None:
            self._background.put(f"{name} of course {course}", do)


def find_stage_before(config: Config, stage: str) -> str | None:
    """The training stage of the run that comes before this one, if there is one."""
    stages = config.training_stages
    return next((before for before, after in pairwise(stages) if after == stage), None)
