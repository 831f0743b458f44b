"""Remember SIGTERM and SIGINT as a flag, which a stage reads after each step, and end a stage that does not read it.

1. Importing this file installs nothing. `python -m stages` installs the handler before it imports anything heavy: the
   kernel drops a signal to process 1 of a container if that process has no handler for it.
2. Python runs a handler between two instructions of the main thread, which may be in a call that does not return: it
   waits for a rank, for a lock or for a store. So the kernel also writes each signal into a pipe, and another thread,
   which reads it, ends the process when its time is over. The checkpoint before is whole: it was written to the end.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from threading import Event, Thread
from types import FrameType
from typing import TYPE_CHECKING

from dmdr.errors import Stopped

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from dmdr.config.stages import StageName

TIME = 45.0  # seconds for the last step and its checkpoint; a flow sends SIGKILL 60 seconds after SIGTERM
SHARE = 0.75  # of the time until SIGKILL, where a cluster gives another one
AFTER_RANKS = 5.0  # seconds for what is left to do when the ranks have ended
STOPS = (signal.SIGTERM, signal.SIGINT)

received: list[int] = []  # grows with each signal
_seen = Event()  # set by the thread that ends this process; the main thread may not have come to its handler


def install() -> None:
    """Catch SIGTERM and SIGINT from now on."""
    for number in STOPS:
        signal.signal(number, _remember)


def is_set() -> bool:
    """Whether a signal to stop has arrived."""
    return bool(received) or _seen.is_set()


def _remember(number: int, frame: FrameType | None) -> None:
    """Record the signal. A second Ctrl-C ends the process at once. A second SIGTERM does not, because the kernel may
    send several when the flow dies, and the checkpoint must not be lost.
    """
    received.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


class Limit(Thread):
    """Ends this process `seconds` after the first signal to stop, whatever its main thread does, with exit code 75.

    stage: for the line that says so; None: says nothing, because another process does.
    """

    def __init__(self, stage: str | None, seconds: float) -> None:
        super().__init__(name="stop limit", daemon=True)
        self.stage, self.seconds = stage, seconds
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        if is_set():  # it came before
            os.write(self._writes, bytes([signal.SIGTERM]))

    def run(self) -> None:
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            ready, _, _ = select.select([self._reads], [], [], None if deadline is None else 0.1)
            if ready:
                numbers = os.read(self._reads, 64)
                if 0 in numbers:  # no signal has this number
                    return
                if deadline is None and not set(STOPS).isdisjoint(numbers):
                    deadline = time.monotonic() + self.seconds
                    _seen.set()
        if self.stage is not None:
            print(f"{self.stage}: {describe_end(self.seconds)}", file=sys.stderr, flush=True)
        os._exit(Stopped.exit_code)

    def end(self) -> None:
        """End the thread; the process goes on. It may be ended twice."""
        if not self.is_alive():
            return
        signal.set_wakeup_fd(self._before)
        os.write(self._writes, b"\0")
        self.join()
        os.close(self._reads)
        os.close(self._writes)


def count_seconds(config: Config, stage: StageName) -> float:
    """The seconds that a stage has after a signal to stop."""
    cluster = config.execution.cluster
    if cluster is None or "KUBERNETES_SERVICE_HOST" not in os.environ:
        return TIME
    return cluster.of(stage).grace * SHARE


def start_limit(stage: str | None, seconds: float) -> Limit:
    """Start the thread that ends this process after a signal to stop."""
    limit = Limit(stage, seconds)
    limit.start()
    return limit


def describe_end(seconds: float, who: str = "") -> str:
    """One line for the user. who: did not end by itself."""
    return (
        f"was told to stop{f', and {who}' if who else ' and'} did not finish within {seconds:.0f} s, so it was ended; "
        "the last checkpoint is whole: repeat the command to go on"
    )
