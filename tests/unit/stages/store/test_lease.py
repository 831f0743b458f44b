"""Who works on a stage: one live copy, and another when that one has died or gives no sign."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmdr.errors import Stopped, StoreError
from stages.store import lease, locks
from stages.store.artifacts import Artifact
from stages.store.folder import ATTEMPT, Folder
from stages.store.lease import Lease, find_lease
from stages.store.locks import Owner, describe_self, parse_present
from tests.support import program
from tests.support.sealing import PROVENANCE
from tests.support.store_bench import IDENTITY, INPUTS, Bench, write

pytestmark = pytest.mark.process  # other holders of a lock are processes


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE", 1.5)
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "POLL_REMOTE", 0.2)
    monkeypatch.setattr(locks, "PATIENCE", 1.5)
    monkeypatch.setattr(locks, "UNTIL_TOLD", 0.1)


def take(artifact: Artifact) -> Lease | None:
    """As a process of its own would, whose environment has no lease."""
    os.environ.pop(lease.VARIABLE, None)
    return find_lease(artifact, lambda: None, takes=True)


@contextmanager
def standing_by(artifact: Artifact) -> Iterator[list[Lease | None]]:
    found: list[Lease | None] = []
    thread = threading.Thread(target=lambda: found.append(take(artifact)))
    thread.start()
    yield found
    thread.join(timeout=20)
    assert found, "it still stands by"


def test_the_second_copy_takes_over_when_the_first_gives_the_lease_back(
    bench: Bench, capfd: pytest.CaptureFixture
) -> None:
    first, second = bench.artifact(), bench.artifact()
    first.claim(IDENTITY, INPUTS)
    held = take(first)
    held.start_signs()
    with standing_by(second) as found:
        time.sleep(2.5)  # longer than PATIENCE: its signs keep the lease
        assert not found
        held.check()
        held.release()
    found[0].check()
    found[0].release()
    err = capfd.readouterr().err
    assert f"cold_start: process {os.getpid()} on this machine runs this stage already; standing by" in err
    assert "the other copy ended without a seal; taking over" in err


def test_the_second_copy_ends_when_the_first_has_sealed(bench: Bench, tmp_path: Path) -> None:
    first, second = bench.artifact(), bench.artifact()
    first.claim(IDENTITY, INPUTS)
    held = take(first)
    held.start_signs()
    with standing_by(second) as found:
        first.seal(write(tmp_path / "out", {"a": b"a"}), facts={}, provenance=PROVENANCE)
        held.release()
    assert found == [None]
    assert not [name for name in bench.names() if "lease" in name], "nothing is left of it"


def test_a_copy_that_gave_no_sign_has_lost_its_lease_on_s3(bench: Bench) -> None:
    """It never started its signs, as if somebody had stopped its process."""
    artifact = bench.artifact()
    artifact.claim(IDENTITY, INPUTS)
    frozen = take(artifact)
    if bench.root is not None:  # the kernel knows that its process lives
        with pytest.raises(Stopped, match="has given no sign for 2 s; end it with kill -9"):
            take(bench.artifact())
        return
    new = take(bench.artifact())
    with pytest.raises(Stopped, match="another copy of this stage has taken over"):
        artifact.check_claim()
    frozen._give_sign()
    frozen.release()
    new.check()
    new.release()


def test_a_claim_yields_although_a_lease_was_given_back(bench: Bench) -> None:
    artifact = bench.artifact()
    artifact.claim(IDENTITY, INPUTS)
    take(artifact).release()
    assert artifact.is_bare() or bench.root is not None  # our own attempt is busy


HOLDS = """
import sys, time
from pathlib import Path
from stages.store.folder import Folder
with Folder(Path(sys.argv[1])).alone():
    print("has it", flush=True)
    time.sleep(600)
"""


def test_a_lock_of_a_stopped_process_is_reported_with_its_owner(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with program.start(HOLDS, str(tmp_path)) as holder:
        try:
            assert holder.stdout.readline() == "has it\n"
            os.kill(holder.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(StoreError) as refused, Folder(tmp_path).alone():
                pass
            assert time.monotonic() - began < 10
        finally:
            holder.kill()
    said = str(refused.value)
    assert f"process {holder.pid} on this machine, which writes to {tmp_path}, has given no sign" in said
    assert f"somebody stopped it (SIGSTOP): let it go on with kill -CONT {holder.pid}" in said
    assert f"waiting for process {holder.pid} on this machine, which writes to" in capfd.readouterr().err
    with Folder(tmp_path).alone():  # the kernel freed it
        pass


def test_a_note_of_a_killed_process_names_nobody(tmp_path: Path) -> None:
    with program.start(HOLDS, str(tmp_path)) as holder:
        assert holder.stdout.readline() == "has it\n"
        note = next(tmp_path.glob(f"{ATTEMPT}*/holds-the-lock.json")).read_bytes()
        assert parse_present(note).process == holder.pid
        holder.kill()
        holder.wait()
    assert parse_present(note) is None
    ours = describe_self("tests")
    other = ours.model_copy(update={"started": "1"})
    assert parse_present(ours.to_json()) == ours
    assert parse_present(other.to_json()) is None, "another process has its number now"
    elsewhere = Owner(token="t", process=1, host="gpu-7", boot="b", started="1", doing="seals")
    assert parse_present(elsewhere.to_json()).describe() == "process 1 on machine gpu-7, which seals"
    assert parse_present(b'{"token": "t", "proc') is None


def test_a_tidying_process_that_was_stopped_keeps_nobody_out(tmp_path: Path) -> None:
    """It holds the lock of an attempt's folder that it wants to delete."""
    folder = Folder(tmp_path)
    scratch = folder.scratch()
    other = Folder(tmp_path)
    assert other.scratch() != scratch
    other.tidy()
    assert scratch.is_dir()
