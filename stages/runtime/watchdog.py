"""Find out that a stage stands still, from the heartbeats of its processes, and say which of them it is.

1. A rank stands still when its main thread has not moved on for `patience` seconds although it waits for no other rank,
   or when the process itself gives no sign. A rank that waits for another is not to blame, however long that takes.
2. If all ranks wait for each other that long, none of them will go on. This is judged only if no other machine has
   ranks: they could wait for one of those.
3. Time in which the watching process itself did not run does not count: the machine slept, or somebody stopped all.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import INTERNAL, Stopped
from stages.runtime import stop_signal
from stages.runtime.heartbeat import Beat, Board, Heart, start_heart

PACE = 0.5  # seconds between two beats
OWN_GAP = 5.0  # seconds between two looks, from which on the watching process itself did not run


@dataclass
class Rank:
    """What is known of a rank: its newest beat, and when its numbers last grew, by the monotonic clock."""

    beat: Beat
    moved: float
    beaten: float

    def take(self, beat: Beat, now: float) -> None:
        if beat.moves != self.beat.moves:
            self.moved = now
        if beat.beats != self.beat.beats:
            self.beaten = now
        self.beat = beat


@dataclass(frozen=True)
class Standstill:
    """A rank of this machine that stands still, and for how many seconds. silent: its process gives no sign.
    together: all ranks wait for each other."""

    rank: int
    seconds: float
    silent: bool
    together: bool


class Watchdog:
    """Judges the heartbeats of the ranks of one machine."""

    def __init__(self, patience: float, *, alone: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """alone: no other machine has ranks."""
        self.patience, self.alone, self._clock = patience, alone, clock
        self._ranks: dict[int, Rank] = {}
        self._looked = clock()

    def look(self, beats: Sequence[Beat], running: Sequence[int]) -> Standstill | None:
        """Take the newest beats; the rank that stands still, if one does. running: ranks that have not ended."""
        now = self._clock()
        gap = now - self._looked
        self._looked = now
        for number, beat in enumerate(beats):
            rank = self._ranks.setdefault(number, Rank(beat, now, now))
            if gap > OWN_GAP:
                rank.moved, rank.beaten = rank.moved + gap, rank.beaten + gap
            rank.take(beat, now)
        return self._judge({number: self._ranks[number] for number in running}, now)

    def _judge(self, ranks: dict[int, Rank], now: float) -> Standstill | None:
        still = {number: rank for number, rank in ranks.items() if now - rank.moved >= self.patience}
        silent = {number for number, rank in still.items() if now - rank.beaten >= self.patience / 2}
        to_blame = {number: rank for number, rank in still.items() if number in silent or not rank.beat.waits}
        together = self.alone and not to_blame and len(still) == len(ranks) > 0
        if together:
            to_blame = still
        if not to_blame:
            return None
        # a rank whose process does not run is the reason why others stand still, and so is the one that did so first
        number = min(to_blame, key=lambda each: (each not in silent, to_blame[each].moved))
        return Standstill(number, now - to_blame[number].moved, number in silent, together)


def read_state(process: int) -> str:
    """The kernel's letter for what a process does, T if it is stopped; empty where the kernel does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def describe(standstill: Standstill, *, name: str, process: int, patience: float) -> str:
    """One line for the user. name: of the rank, empty for a stage of one process."""
    reason = ""
    if read_state(process) in ("T", "t"):
        reason = f": somebody stopped process {process} (SIGSTOP)"
    elif standstill.together:
        reason = ": all ranks wait for each other"
    elif standstill.silent:
        reason = f": process {process} gives no sign of life"
    who = f"{name} made" if name else "made"
    return (
        f"{who} no progress for {standstill.seconds:.0f} s{reason}; the stage was ended, because execution.watchdog is "
        f"{patience:g}: see the stacks above, then repeat the command to go on from the last checkpoint"
    )


def watch_self(stage: str, patience: float) -> Heart:
    """Start a thread that ends this process if its main thread stands still: with 70, or 75 if it was told to stop."""
    dog = Watchdog(patience, alone=False)

    def judge(beat: Beat) -> None:
        standstill = dog.look([beat], [0])
        if standstill is not None:
            say(stage, "the stacks of all threads:")
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
            say(stage, describe(standstill, name="", process=os.getpid(), patience=patience))
            os._exit(Stopped.exit_code if stop_signal.is_set() else INTERNAL)

    return start_heart(PACE, judge)


def show_to_watcher(board: Board, rank: int) -> Heart:
    """Start a thread that shows the heartbeat of this rank to the process that started it."""
    return start_heart(PACE, lambda beat: board.write(rank, beat))


def say(stage: str, line: str) -> None:
    """Print a line of a stage on stderr at once."""
    print(f"{stage}: {line}", file=sys.stderr, flush=True)
