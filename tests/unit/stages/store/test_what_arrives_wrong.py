"""A store that is busy, lists wrongly or sends wrong bytes, and what killed attempts have left on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmdr.errors import DataError, StoreError
from flows import cli
from stages.store import address, s3_errors
from stages.store.remote import Remote
from tests.support.s3_proxy import Faults, s3_proxy
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE
from tests.support.store_bench import IDENTITY, INPUTS, Bench, same, save, write


@pytest.fixture
def proxy(s3: str) -> Iterator[Faults]:
    with s3_proxy(s3) as faults:
        yield faults


@pytest.fixture
def remote(proxy: Faults, tmp_path: Path) -> Bench:
    return Bench(f"s3://{BUCKET}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:10]}/runs", None)


@pytest.mark.process
def test_a_download_that_arrives_wrong_is_asked_for_again(
    remote: Bench, proxy: Faults, tmp_path: Path, rng: random.Random
) -> None:
    artifact = remote.artifact(stage="export")
    artifact.claim(IDENTITY, INPUTS)
    artifact.seal(write(tmp_path / "out", {"diffusers/w": b"good" * 100}), facts={}, provenance=PROVENANCE)
    record = artifact.record()
    for read in (lambda cache: artifact.fetch(cache), lambda cache: pull(remote, cache)):
        assert artifact.record() == record
        proxy.answers = {}
        proxy.flip = "export/diffusers/w"
        proxy.flipped = 2
        folder = read(tmp_path / f"cache{proxy.random.random()}")
        assert (folder / "diffusers/w").read_bytes() == b"good" * 100
        assert proxy.flipped == 0
        proxy.flipped = 99
        with pytest.raises((DataError, AssertionError)):
            read(tmp_path / f"cache{proxy.random.random()}")
        proxy.flipped = 0


def pull(bench: Bench, folder: Path) -> Path:
    assert cli.main(["pull", "r", "export", str(folder), "--store", bench.url]) == 0
    return folder


@pytest.mark.process
def test_a_listing_without_the_claim_is_asked_for_again(
    remote: Bench, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "PAUSE", 0.05)
    save(remote.artifact(), 1, 2)
    proxy.empty_lists = 3
    assert same(remote.artifact().checkpoints(2).newest(), 2)
    assert proxy.empty_lists == 0
    proxy.empty_lists = 99
    with pytest.raises(StoreError, match=r"lists .* without its claim\.json"):
        remote.artifact().checkpoints(2).newest()


@pytest.mark.process
def test_a_busy_store_is_waited_for_as_long_as_patience_says(
    remote: Bench, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("SHORTEST", 0.01), ("LONGEST", 0.02), ("PATIENCE", 3.0)):
        monkeypatch.setattr(s3_errors, name, seconds)
    assert remote.artifact().record() is None, "it has answered once"
    proxy.busy_until = time.monotonic() + 1.5
    assert remote.artifact().record() is None
    proxy.busy_until = time.monotonic() + 60
    began = time.monotonic()
    with pytest.raises(StoreError, match="SlowDown|Service ?Unavailable|503"):
        remote.artifact().record()
    assert time.monotonic() - began > 3.0


@pytest.mark.process
def test_what_a_killed_attempt_has_left_on_this_machine_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    """Its copies of a store's files; those of an attempt that lives stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = f"s3://{BUCKET}/{tmp_path.name}"
    first, second, killed = Remote(url), Remote(url), Remote(url)
    alive = first.scratch()
    child = os.fork()
    if child == 0:
        (killed.scratch() / "copy").write_bytes(b"x" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("dmdr-*/.attempt-*"))) == 2
    assert {second.scratch(), alive} == set(tmp_path.glob("dmdr-*/.attempt-*"))
    assert not list(tmp_path.rglob("copy"))
