"""Work that nobody waits for: a thread does it, one piece after another, and its errors stop nothing.

1. A piece of work has a name. One that has not begun when another of its name comes is replaced: the newest counts.
2. At most `most` pieces wait. Where more come, because a store or a service is away, the oldest is dropped.
3. What fails is tried again later, after a pause that grows. The first failure is one line for the user.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition, Thread

from dmdr.config.plain_text import to_line
from dmdr.config.secrets import hide_secrets

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds after a failure
MOST = 64  # pieces of work that wait
LONGEST_LINE = 300  # letters of an error's message

Work = Callable[[], object]


class Background:
    """A thread and the work that waits for it. what: in the line that tells of a failure. say: takes that line."""

    def __init__(self, what: str, say: Callable[[str], None], *, most: int = MOST) -> None:
        self.what, self.say, self.most = what, say, most
        self._waiting: dict[str, Work] = {}
        self._changed = Condition()
        self._is_ending, self._has_failed = False, False
        self._pause = FIRST_PAUSE
        self._thread: Thread | None = None

    def put(self, name: str, work: Work) -> None:
        """Have work done later. It costs the caller nothing but this."""
        with self._changed:
            if self._is_ending:
                return
            self._waiting[name] = work
            while len(self._waiting) > self.most:
                del self._waiting[next(iter(self._waiting))]
            self._changed.notify()
        if self._thread is None:
            self._thread = Thread(target=self._run, name=self.what, daemon=True)
            self._thread.start()

    def end(self, seconds: float) -> None:
        """Do what still waits, each piece once more, for at most `seconds`; the rest is dropped."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (piece := self._take()) is not None:
            name, work = piece
            try:
                work()
                self._pause = FIRST_PAUSE
            except Exception as error:  # whatever it is, training goes on
                self._tell(error)
                self._try_later(name, work)

    def _take(self) -> tuple[str, Work] | None:
        """The oldest piece of work; None when all is done and no more will come."""
        with self._changed:
            while not self._waiting:
                if self._is_ending:
                    return None
                self._changed.wait()
            name = next(iter(self._waiting))
            return name, self._waiting.pop(name)

    def _try_later(self, name: str, work: Work) -> None:
        with self._changed:
            if self._is_ending:
                return
            if name not in self._waiting and len(self._waiting) < self.most:
                self._waiting[name] = work
            until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            while not self._is_ending and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _tell(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            self.say(f"{self.what} fails ({describe(error)}); training goes on, and it is tried again")


def describe(error: BaseException) -> str:
    """An error in one line of bounded length, without secrets."""
    return hide_secrets(to_line(str(error) or type(error).__name__))[:LONGEST_LINE]
