"""The lease of a stage: one live copy of it works, another stands by and takes over when the first has died.

1. A lease saves work. No result depends on it: two copies that both believe to hold it seal one record between them, as
   `artifacts.py` has it. A copy that lost its lease while it was stopped stores no checkpoint any more.
2. In a folder the lease is the lock of the folder `.attempt-lease`, which the kernel frees with its process.
3. On S3 it is an object, `lease/000001.json`, which only its holder writes, each time with a higher beat. A copy that
   has seen no change for PATIENCE seconds creates the next number, which the store grants to one copy only.
4. Clocks of two machines are never compared: a copy that stands by measures by its own how long nothing has changed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dmdr.errors import Stopped
from stages.store import locks
from stages.store.address import open_place
from stages.store.artifacts import Artifact
from stages.store.folder import ATTEMPT, Folder, translate_errors
from stages.store.layout import LEASES
from stages.store.locks import Owner, Signs, Unchanged
from stages.store.s3_errors import Refused

if TYPE_CHECKING:
    from stages.store.remote import Remote

VARIABLE = "DMDR_LEASE"  # the token of the lease, in the environment of the ranks that work under it
BEAT = 20.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one; on S3 the lease is then free, in a folder its holder was stopped
POLL_FOLDER, POLL_REMOTE = 0.2, 5.0  # seconds between two looks of a copy that stands by
OWNER = "owner.json"


class Seat(Protocol):
    """Where the lease of one address lies."""

    poll: float

    def read(self) -> Owner | None:
        """Who has it, or had it last."""

    def take(self, owner: Owner) -> bool:
        """Take it if it is free. Raises Stopped if it is not free and its holder gives no sign."""

    def give_sign(self, owner: Owner) -> None:
        """Write that the holder lives."""

    def leave(self, owner: Owner, *, sealed: bool) -> None:
        """Give it back. sealed: the stage is sealed, and nobody needs the lease any more."""


class FolderSeat:
    """The lease of an address in a folder: the lock of one of its folders."""

    def __init__(self, place: Folder) -> None:
        self.poll = POLL_FOLDER
        self._folder = place.root / f"{ATTEMPT}lease"
        self._handle: int | None = None
        self._unchanged = Unchanged()

    def read(self) -> Owner | None:
        try:
            return locks.parse_owner((self._folder / OWNER).read_bytes())
        except OSError:
            return None

    def take(self, owner: Owner) -> bool:
        with translate_errors("lock", self._folder):
            self._handle = _lock_folder(self._folder)
            if self._handle is not None:
                self.give_sign(owner)
                return True
        holder = self.read()
        silent = self._unchanged.look(holder)
        if holder is None or holder.is_gone():
            return False
        if silent > (PATIENCE if holder.is_here() else 3 * PATIENCE):  # a network's file system may show old files
            raise Stopped(
                f"{holder.locate()} runs this stage and has given no sign for {silent:.0f} s; "
                f"{locks.describe_remedy(holder)}, then repeat the command"
            )
        return False

    def give_sign(self, owner: Owner) -> None:
        new = self._folder / f"{OWNER}.new"
        new.write_bytes(owner.to_json())
        new.replace(self._folder / OWNER)

    def leave(self, owner: Owner, *, sealed: bool) -> None:
        assert self._handle is not None, "it was taken"
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._handle)


def _lock_folder(folder: Path) -> int | None:
    """Create and lock a folder; None if another process has it, or deletes it right now."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(FileNotFoundError):
        if locks.try_lock(handle) and os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    os.close(handle)
    return None


class RemoteSeat:
    """The lease of an address on S3: the object with the highest number."""

    def __init__(self, place: Remote) -> None:
        self.poll = POLL_REMOTE
        self._place = place
        self._number = 0  # of the object that is ours
        self._unchanged = Unchanged()

    def read(self) -> Owner | None:
        number = self._find_newest()
        return locks.parse_owner(self._place.read(_name(number))) if number else None

    def take(self, owner: Owner) -> bool:
        number = self._find_newest()
        data = self._place.read(_name(number)) if number else None
        waited = self._unchanged.look((number, data))
        if locks.parse_present(data) is not None and waited < PATIENCE:
            return False
        ours = locks.parse_owner(self._place.create(_name(number + 1), owner.to_json()))
        if ours is None or ours.token != owner.token:
            return False
        self._number = number + 1
        if number:
            self._place.remove(_name(number))
        return True

    def give_sign(self, owner: Owner) -> None:
        self._place.publish(_name(self._number), lambda file: file.write_bytes(owner.to_json()))

    def leave(self, owner: Owner, *, sealed: bool) -> None:
        if sealed:
            for name in self._place.names():
                self._place.remove(name)
        else:  # numbers never fall, so that a copy that was stopped finds a higher one
            self.give_sign(owner.model_copy(update={"released": True}))

    def _find_newest(self) -> int:
        numbers = [int(name.removesuffix(".json")) for name in self._place.names() if name[:6].isdecimal()]
        return max(numbers, default=0)


def _name(number: int) -> str:
    return f"{number:06d}.json"


class Lease:
    """The lease under which this process works on a stage.

    seat: None where another process of the stage sees to it. is_own: this process took it, and gives it back.
    """

    def __init__(self, artifact: Artifact, seat: Seat | None, owner: Owner, *, is_own: bool) -> None:
        self._artifact, self._seat, self._owner, self._is_own = artifact, seat, owner, is_own
        self._signs: Signs | None = None

    def start_signs(self) -> None:
        """Start the thread that gives a sign of life every BEAT seconds, if the lease is this process's own."""
        if self._is_own:
            self._signs = Signs(self._give_sign, BEAT)
            self._signs.start()

    def check(self) -> None:
        """
        Raises:
            Stopped: another copy has taken over, because this one gave no sign.
        """
        if self._is_lost():
            raise Stopped(
                "another copy of this stage has taken over, because this one gave no sign of life; repeat the command "
                "to stand by"
            )

    def release(self) -> None:
        """Give an own lease back, unless another copy has it. If the store fails here, others wait for it longer."""
        if self._signs is not None:
            self._signs.end()
        if self._is_own:
            os.environ.pop(VARIABLE, None)
        with suppress(OSError, ValueError):
            if self._is_own and self._seat is not None and not self._is_lost():
                self._seat.leave(self._owner, sealed=self._artifact.record() is not None)

    def _is_lost(self) -> bool:
        holder = None if self._seat is None else self._seat.read()
        return holder is not None and holder.token != self._owner.token

    def _give_sign(self) -> None:
        if self._seat is not None and not self._is_lost():
            self._owner = self._owner.with_beat()
            self._seat.give_sign(self._owner)


def open_seat(artifact: Artifact) -> Seat:
    """Where the lease of an artifact lies. Its requests to a store share nothing with those of the stage."""
    place = open_place(artifact.address)
    if isinstance(place, Folder):
        return FolderSeat(place)
    from stages.store.remote import Remote

    return RemoteSeat(Remote(f"{artifact.address}/{LEASES}"))


def find_lease(artifact: Artifact, ask_to_stop: Callable[[], object], *, takes: bool) -> Lease | None:
    """The lease of a claimed stage, which its checkpoints check from now on; None if another copy sealed the stage.

    takes: this process waits until it has the lease, unless the process that started it as a rank has it. Its ranks
    find that in their environment. ask_to_stop: called again and again while it waits; it may raise an error.

    Raises:
        Stopped: another copy holds the lease, but gives no sign.
    """
    owner = locks.describe_self(f"runs {artifact.stage} of {artifact.run}")
    if not takes:
        return None if artifact.record() is not None else Lease(artifact, None, owner, is_own=False)
    seat, token = open_seat(artifact), os.environ.get(VARIABLE)
    if token is None:
        has_waited = _stand_by(artifact, seat, owner, ask_to_stop)
        if has_waited is None:
            return None
        if has_waited:
            say(artifact, "the other copy ended without a seal; taking over")
            artifact.place.tidy()  # what the other left
        with suppress(Refused):  # not everybody may list uploads
            artifact.place.end_uploads()
        os.environ[VARIABLE] = owner.token
    else:
        owner = owner.model_copy(update={"token": token})
    lease = Lease(artifact, seat, owner, is_own=token is None)
    artifact.check_lease = lease.check
    if artifact.record() is not None:  # sealed between the last look at the record and now
        lease.release()
        return None
    return lease


def _stand_by(artifact: Artifact, seat: Seat, owner: Owner, ask_to_stop: Callable[[], object]) -> bool | None:
    """Take the lease as soon as it is free. Returns whether that took a line; None: another copy sealed the stage."""
    began, told = time.monotonic(), False
    while not seat.take(owner):
        if artifact.record() is not None:
            return None
        if not told and time.monotonic() - began >= min(locks.UNTIL_TOLD, seat.poll):
            holder = seat.read()
            who = "another copy" if holder is None else holder.locate()
            say(artifact, f"{who} runs this stage already; standing by, to take over if that one ends without a seal")
            told = True
        _wait(seat.poll, ask_to_stop)
    return told


def say(artifact: Artifact, line: str) -> None:
    """Print a line of a stage on stderr at once."""
    print(f"{artifact.stage}: {line}", file=sys.stderr, flush=True)


def _wait(seconds: float, ask_to_stop: Callable[[], object]) -> None:
    """Wait, and ask in between."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, POLL_FOLDER))
        locks.POLLS.count()
        ask_to_stop()
