"""How far a stage is, on the page of its flow run: a progress artifact that follows the lines of the stage.

A thread of its own sends the newest line. A server that is slow or away holds up neither the stage nor its log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from threading import Event, Thread
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from dmdr.config.stages import StageName
from stages.runtime.progress_line import ProgressLine, read_line

FOLLOWED: tuple[StageName, ...] = ("cold_start", "joint", "evaluate")  # the others take seconds
LAST_UPDATE = 10.0  # seconds that the end of a stage waits for it


@contextmanager
def show_progress(stage: StageName, run: str, say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Give what takes each line of the stage instead of `say`, which it also calls."""
    if stage not in FOLLOWED:
        yield say
        return
    follower = Follower(run, stage)

    def tell(line: str) -> None:
        say(line)
        follower.take(line)

    try:
        yield tell
    finally:
        follower.close()


class Follower:
    """Keeps a progress artifact at the newest line of a stage; the first line makes it, so a sealed stage has none."""

    def __init__(self, run: str, stage: StageName) -> None:
        self.run, self.stage = run, stage
        self._newest: ProgressLine | None = None
        self._changed, self._over = Event(), Event()
        context = copy_context()  # which tells Prefect whose artifact it is
        self._thread = Thread(target=context.run, args=(self._send,), daemon=True)
        self._thread.start()

    def take(self, line: str) -> None:
        progress = read_line(line)
        if progress is not None and progress.stage == self.stage and progress.total:
            self._newest = progress
            self._changed.set()

    def close(self) -> None:
        """Send the last line, if that takes no longer than LAST_UPDATE."""
        self._over.set()
        self._changed.set()
        self._thread.join(LAST_UPDATE)

    def _send(self) -> None:
        is_last = False
        artifact: UUID | None = None
        while not is_last:
            self._changed.wait()
            self._changed.clear()
            is_last = self._over.is_set()  # read before the line: what came until then is sent
            line = self._newest
            if line is None:
                continue
            percent, words = min(100.0, 100.0 * line.done / line.total), f"{self.run}: {line}"
            with suppress(HTTPError, PrefectException):  # the next line tries again
                if artifact is None:
                    made = create_progress_artifact(percent, key=self.stage.replace("_", "-"), description=words)
                    assert isinstance(made, UUID), "outside of a coroutine, Prefect has waited for the answer"
                    artifact = made
                else:
                    update_progress_artifact(artifact, percent, description=words)
