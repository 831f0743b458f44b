"""What an open training stage shows, on the page of its flow run: the newest images and the teacher's, and an event of
Prefect for each alarm. It is read from the store, so it is the same for processes and Jobs.

A thread of its own looks every EVERY seconds. A store or a server that is away holds up neither the stage nor its log.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from threading import Event as Signal
from threading import Thread

from httpx import HTTPError
from prefect.artifacts import create_image_artifact
from prefect.exceptions import PrefectException

from dmdr.config.stages import TRAINING_STAGES, StageName
from dmdr.errors import USER_ERRORS
from flows.prefect_support import news
from flows.prefect_support.artifacts import LARGEST_IMAGE
from stages.live.images import StripFile
from stages.live.read import LiveReader
from stages.runtime.events import build_alarm
from stages.store.artifacts import Artifact

EVERY = 30.0  # seconds between two looks
LAST_LOOK = 10.0  # seconds that the end of a stage waits for the last one


@contextmanager
def follow_live(stage: StageName, run: str, store: str) -> Iterator[None]:
    """As long as the block lasts, show what the stage shows."""
    if stage not in TRAINING_STAGES:
        yield
        return
    follower = LiveFollower(stage, run, store)
    context = copy_context()  # which tells Prefect whose artifacts they are
    thread = Thread(target=context.run, args=(follower.follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        follower.over.set()
        thread.join(LAST_LOOK)


class LiveFollower:
    """Remembers what Prefect knows already."""

    def __init__(self, stage: StageName, run: str, store: str) -> None:
        self.artifact, self.over = Artifact(store, run, stage), Signal()
        self._reader = LiveReader(store, run, stage)
        self._told: set[tuple[int, str]] = set()
        self._has_teacher = False
        self._shown = -1  # update of the newest strip that is shown

    def follow(self) -> None:
        """Look again and again, and once more at the end."""
        is_last = False
        while not is_last:
            is_last = self.over.wait(EVERY)
            with suppress(*USER_ERRORS, HTTPError, PrefectException):
                self.look()

    def look(self) -> None:
        """Pass on what is new."""
        series = self._reader.read()
        for alarm in series.alarms:
            if (alarm.update, alarm.line) not in self._told:
                self._told.add((alarm.update, alarm.line))
                news.emit(build_alarm(self.artifact, alarm.update, alarm.line))
        newest = series.strips[-1] if series.strips else -1
        if newest != self._shown and self._publish(
            self._reader.read_strip_file(newest), "student", f"the student after update {newest}"
        ):
            self._shown = newest
        if series.has_teacher and not self._has_teacher:
            self._has_teacher = self._publish(self._reader.read_teacher_file(), "teacher", "the teacher, to compare")

    def _publish(self, strip: StripFile | None, who: str, words: str) -> bool:
        """Whether a strip is there and small enough to be shown."""
        if strip is None or len(strip.data) > LARGEST_IMAGE:
            return False
        kind = "jpeg" if strip.ending == "jpg" else "png"
        address = f"data:image/{kind};base64,{base64.b64encode(strip.data).decode()}"
        key = f"{self.artifact.stage.replace('_', '-')}-{who}"
        create_image_artifact(address, key=key, description=f"{self.artifact.run}, {self.artifact.stage}: {words}")
        return True
