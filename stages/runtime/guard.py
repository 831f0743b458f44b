"""The two threads that see to it that the process of a stage ends: after a signal to stop, and when it stands still.

A process that starts ranks ends both before, because a process with threads cannot be forked; then it watches the ranks
instead.
"""

from __future__ import annotations

import os

from dmdr.config.run import Config
from dmdr.config.stages import StageName
from stages.runtime import heartbeat, ranks, stop_signal, watchdog


class Guard:
    """The threads of one process of a stage."""

    def __init__(self, stage: StageName) -> None:
        self.stage = stage
        self._board = heartbeat.find_board()  # of the process that started this rank, which watches it
        self._heart: heartbeat.Heart | None = None
        says = self._board is None and not ranks.read_rank()
        self._limit = stop_signal.start_limit(stage if says else None, stop_signal.TIME)

    def watch(self, config: Config) -> None:
        """Watch the main thread from now on."""
        later = 0.0 if self._board is None else stop_signal.AFTER_RANKS  # whoever started this rank ends it first
        self._limit.seconds = stop_signal.count_seconds(config, self.stage) + later
        if self._board is None:
            self._heart = watchdog.watch_self(self.stage, config.execution.watchdog)
        else:
            self._heart = watchdog.show_to_watcher(self._board, int(os.environ["LOCAL_RANK"]))

    def heed_waits(self) -> None:
        """From now on, a rank that waits for others does not stand still. torch is imported now."""
        from dmdr.distributed import WAIT

        assert self._heart is not None, "it watches"
        self._heart.waits = WAIT.__bool__

    def end(self) -> None:
        """End the threads. They may be ended twice."""
        self._limit.end()
        if self._heart is not None:
            self._heart.end()
