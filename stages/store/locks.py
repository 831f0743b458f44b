"""Locks of files and folders that are waited for in bounded time, and that tell who holds them.

1. The kernel frees a lock when its process ends, so nothing has to be cleaned up after a kill. But a process that was
   stopped, or waits for a dead disk, keeps its locks.
2. Whoever holds a lock writes into a file beside it who it is, and writes again every few seconds. Whoever waits looks
   at that file. As long as it changes, the holder is alive and works; when it has not changed for PATIENCE seconds, the
   wait ends with one line. Only the waiting process's own clock is asked.
3. The file may be older than the lock: its process was killed, and another has the lock now. A process of this machine
   that is not there any more is therefore never named.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Event, Thread

from dmdr.errors import StoreError
from stages.store.records import Document

PATIENCE = 60.0  # seconds without a sign of the holder
BEAT = 5.0  # seconds between two signs
UNTIL_TOLD = 2.0  # seconds of waiting before it is worth a line
POLL = 0.1  # seconds
STARTED = 19  # place of a process's start among the facts of /proc/PID/stat, from its state on


class Polls:
    """How often this process has asked for what another process has. Such a wait has its own end, here and in
    `lease.py`, so a watchdog takes it for progress."""

    def __init__(self) -> None:
        self.number = 0

    def count(self) -> None:
        self.number += 1


POLLS = Polls()


class Awaited:
    """The thread of this process that the main thread waits for, if it does: its progress is the main thread's then."""

    def __init__(self) -> None:
        self.ident: int | None = None

    def join(self, thread: Thread) -> None:
        """Wait in the main thread until a thread has ended."""
        self.ident = thread.ident
        try:
            thread.join()
        finally:
            self.ident = None


AWAITED = Awaited()


class Owner(Document):
    """Who holds a lock. token: another for each holder. beat: grows while it lives."""

    token: str
    process: int
    host: str
    boot: str  # of the machine's kernel: two machines may have one name
    started: str  # of the process, by the kernel's clock: a later process may have its number
    doing: str  # for the line of whoever waits: "writes to runs/tiny/joint"
    beat: int = 0
    released: bool = False  # the holder ended in order

    def with_beat(self) -> Owner:
        """The same, one sign of life later."""
        return self.model_copy(update={"beat": self.beat + 1})

    def is_here(self) -> bool:
        """Whether it is a process of this machine, as far as this process can see."""
        return (self.host, self.boot) == (socket.gethostname(), _read_boot())

    def is_gone(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        if not self.is_here() or not self.started:
            return False
        stat = _read_stat(self.process)
        return stat[:1] in ([], ["Z"], ["X"]) or _find_start(stat) != self.started

    def is_stopped(self) -> bool:
        """Whether it is a process of this machine that somebody stopped (SIGSTOP)."""
        return self.is_here() and not self.is_gone() and _read_stat(self.process)[:1] in (["T"], ["t"])

    def locate(self) -> str:
        """ "process 12 on this machine"."""
        return f"process {self.process} on {'this machine' if self.is_here() else f'machine {self.host}'}"

    def describe(self) -> str:
        """ "process 12 on this machine, which writes to runs/tiny/joint"."""
        return f"{self.locate()}, which {self.doing}"


def describe_self(doing: str) -> Owner:
    """This process as an owner."""
    process = os.getpid()
    return Owner(
        token=uuid.uuid4().hex,
        process=process,
        host=socket.gethostname(),
        boot=_read_boot(),
        started=_find_start(_read_stat(process)),
        doing=doing,
    )


def describe_remedy(owner: Owner) -> str:
    """What to do about an owner that gives no sign."""
    at = "" if owner.is_here() else f" on {owner.host}"
    if owner.is_stopped():
        return f"somebody stopped it (SIGSTOP): let it go on with kill -CONT {owner.process}, or end it with kill -9"
    return f"end it with kill -9 {owner.process}{at}"


def parse_owner(data: bytes | None) -> Owner | None:
    """The owner that a file names; None if it names none."""
    try:
        return Owner.model_validate_json(data) if data else None
    except ValueError:  # half written
        return None


def parse_present(data: bytes | None) -> Owner | None:
    """The owner that a file names; None if it names none, or one that has ended as far as this process can see."""
    owner = parse_owner(data)
    return None if owner is None or owner.released or owner.is_gone() else owner


class Signs(Thread):
    """Calls `give` every `every` seconds, until the end."""

    def __init__(self, give: Callable[[], object], every: float) -> None:
        super().__init__(name="signs of life", daemon=True)
        self.give, self.every = give, every
        self._end = Event()

    def run(self) -> None:
        while not self._end.wait(self.every):
            with suppress(OSError, ValueError):  # the store fails; the main thread meets that, too, and reports it
                self.give()

    def end(self) -> None:
        """End the thread. A sign that hangs in the store is not waited for."""
        self._end.set()
        self.join(timeout=1.0)


class Unchanged:
    """For how long what somebody writes has stayed the same, by this process's own clock."""

    def __init__(self) -> None:
        self._content: object = None
        self._since = time.monotonic()

    def look(self, content: object) -> float:
        """Take what is there now; the seconds since it was something else."""
        if content != self._content:
            self._content, self._since = content, time.monotonic()
        return time.monotonic() - self._since


@contextmanager
def announce(note: Path, doing: str) -> Iterator[None]:
    """Say in the file `note`, as long as the block lasts, that this process holds a lock, and that it lives."""
    owner = describe_self(doing)

    def give_sign() -> None:
        nonlocal owner
        owner = owner.with_beat()
        note.write_bytes(owner.to_json())

    with suppress(OSError):  # a full disk
        give_sign()
    signs = Signs(give_sign, BEAT)
    signs.start()
    try:
        yield
    finally:
        signs.end()
        with suppress(OSError):
            note.write_bytes(b"")


def wait_for(handle: int, doing: str, read_owner: Callable[[], Owner | None]) -> None:
    """Lock an open file or folder; tell the user whom this process waits for.

    doing: what this process needs the lock for. read_owner: finds what another holder has announced.

    Raises:
        StoreError: another process holds it, and has given no sign for PATIENCE seconds.
    """
    began, unchanged, told = time.monotonic(), Unchanged(), False
    while not try_lock(handle):
        owner = read_owner()
        seconds = unchanged.look(owner)
        whom = f"another process, which {doing}" if owner is None else owner.describe()
        if not told and time.monotonic() - began > UNTIL_TOLD:
            print(f"waiting for {whom}", file=sys.stderr, flush=True)
            told = True
        if seconds > PATIENCE:
            what = "stop or end it" if owner is None else describe_remedy(owner)
            raise StoreError(
                f"{whom}, has given no sign for {PATIENCE:.0f} s and keeps its lock; {what}, then repeat the command"
            )
        time.sleep(POLL)
        POLLS.count()


def try_lock(handle: int) -> bool:
    """Lock an open file or folder unless another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _find_start(stat: list[str]) -> str:
    """When a process started, of the kernel's facts about it; empty without them."""
    return stat[STARTED] if len(stat) > STARTED else ""


def _read_stat(process: int) -> list[str]:
    """The kernel's facts about a process, from its state on; empty if there is none, or where the kernel tells none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@cache
def _read_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
