"""The heartbeat of a process that works for a stage: a number that grows as long as its main thread moves on.

1. That a process lives says nothing. A thread looks at the main thread: it moves on when it has entered or left a
   function of Python since, when it is at another line, or when the process has read or written a MiB. So the
   number grows while networks run, a model loads, a checkpoint is saved or a store is slow, and stands still in a call
   that never returns: in a sum that waits for a rank, in a lock, in a read from a dead disk. While it waits for a
   thread of its own that writes a checkpoint, that thread is looked at as well.
2. The number lies in memory that the process which started the ranks shares, so it needs no collective, and a rank that
   cannot run any more cannot lie.
3. A signal makes the process write the stacks of all its threads to stderr, even while a call of C holds it.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, main_thread

from stages.store.locks import AWAITED, POLLS

VARIABLE = "DMDR_HEARTBEATS"  # the descriptor of the shared memory, in the environment of a rank
SHOW_STACKS = signal.SIGUSR1
ROW = struct.Struct("<QQQ")
AMOUNT = 2**20  # bytes read or written that count as progress; libraries exchange smaller messages while they wait


@dataclass(frozen=True)
class Beat:
    """moves: how often the main thread has moved on. beats: how often it was looked at. waits: for other ranks."""

    moves: int = 0
    beats: int = 0
    waits: bool = False


class Board:
    """The newest beat of each rank of this machine, in memory that their processes share."""

    def __init__(self, descriptor: int, ranks: int) -> None:
        self.descriptor, self.ranks = descriptor, ranks
        self._memory = mmap.mmap(descriptor, ROW.size * ranks)

    def write(self, rank: int, beat: Beat) -> None:
        ROW.pack_into(self._memory, rank * ROW.size, beat.moves, beat.beats, beat.waits)

    def read(self) -> list[Beat]:
        rows = (ROW.unpack_from(self._memory, rank * ROW.size) for rank in range(self.ranks))
        return [Beat(moves, beats, bool(waits)) for moves, beats, waits in rows]


def create_board(ranks: int) -> Board:
    """New memory for this many ranks. The system frees it with the last process that has it."""
    with tempfile.TemporaryFile() as file:
        file.truncate(ROW.size * ranks)
        descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, True)
    return Board(descriptor, ranks)


def find_board() -> Board | None:
    """The memory that the process which started this rank watches; None if there is none."""
    number = os.environ.get(VARIABLE)
    return None if number is None else Board(int(number), int(os.environ["LOCAL_WORLD_SIZE"]))


class Heart(Thread):
    """Looks at the main thread every `every` seconds and passes each beat on."""

    def __init__(self, every: float, report: Callable[[Beat], object]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.every, self.report = every, report
        self.waits: Callable[[], bool] = bool  # tells whether the main thread waits for other ranks
        self._beats, self._moves = 0, 0
        self._last: tuple[int | bytes, ...] | None = None
        self._stacks = Stacks()
        self._bytes, self._own = 0, 0  # of the process at the last move, and what looking has read since the start
        self._end = Event()

    def run(self) -> None:
        while not self._end.wait(self.every):
            self.report(self.look())

    def end(self) -> None:
        """End the thread. It may be ended twice."""
        self._end.set()
        self.join()

    def look(self) -> Beat:
        """Look at the main thread."""
        now: tuple[int | bytes, ...] = (POLLS.number, *self._stacks.find([main_thread().ident, AWAITED.ident]))
        counters = _read_counters()
        self._own += len(counters)
        transferred = _sum_bytes(counters) - self._own - self._stacks.own
        self._beats += 1
        if now != self._last or transferred - self._bytes >= AMOUNT:
            self._moves += 1
            self._last, self._bytes = now, transferred
        return Beat(self._moves, self._beats, self.waits())


def start_heart(every: float, report: Callable[[Beat], object]) -> Heart:
    """Start the heartbeat of this process, and let SHOW_STACKS show its stacks."""
    faulthandler.register(SHOW_STACKS, file=sys.__stderr__ or 2, all_threads=True)
    heart = Heart(every, report)
    heart.start()
    return heart


class Stacks:
    """Where threads of this process are, line by line.

    The frames of another thread are not safe to hold: Python 3.11.7 was seen to crash in `frame.f_back` of one that had
    ended meanwhile. faulthandler makes no frames. It writes the lines at one moment, in which no other thread runs
    Python: of 100 threads and 100 frames each at most.

    own: bytes that looking has written and read.
    """

    def __init__(self) -> None:
        # in memory, where Linux has such files: a full disk would show nothing, and a rank that moves as standing still
        if sys.platform == "linux":
            memory = os.memfd_create("stacks")
        else:
            with tempfile.TemporaryFile() as file:
                memory = os.dup(file.fileno())
        self._file = os.fdopen(memory, "rb")
        self.own = 0

    def find(self, idents: list[int | None]) -> list[bytes]:
        """The stacks of these threads."""
        descriptor = self._file.fileno()
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        faulthandler.dump_traceback(descriptor, all_threads=True)
        text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        self.own += 2 * len(text)
        stacks = text.split(b"\n\n")
        names = [b"0x%016x" % ident for ident in idents if ident is not None]
        return [stack for name in names for stack in stacks if name in stack.partition(b"\n")[0]]


def _read_counters() -> str:
    """What this process has read and written, as Linux tells it; empty elsewhere."""
    try:
        return Path("/proc/self/io").read_text()
    except OSError:
        return ""


def _sum_bytes(counters: str) -> int:
    lines = (line.split() for line in counters.splitlines())
    return sum(int(value) for name, value in lines if name in ("rchar:", "wchar:", "read_bytes:"))
