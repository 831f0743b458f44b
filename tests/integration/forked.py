"""What needs a process that can be forked: SIGKILL at any call, full and read-only disks, memory that stays bounded.

pytest does not collect this file by itself: `test_store_killed.py` runs it in a fresh process. A fork of one that has
other threads (fsspec's, Prefect's) can hang.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmdr.config.inputs import Prompts
from dmdr.errors import InputMissing
from dmdr.promptset import write_shard
from stages import prompts
from stages.prompt_sources.report import Tally
from stages.store.artifacts import Artifact
from stages.store.folder import ATTEMPT
from tests.support.memory import peak
from tests.support.sealing import PROVENANCE
from tests.support.stage_process import ROOT
from tests.support.store_bench import IDENTITY, INPUTS, Bench, check, contents, same, save, sealed, write

pytestmark = pytest.mark.process  # it forks, and kills what it forked

CALLS = {
    "open",
    "os.rename",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.listdir",
    "os.scandir",
    "fcntl.flock",
    "shutil.rmtree",
    "shutil.move",
    "tempfile.mkstemp",
    "tempfile.mkdtemp",
}


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child process that gets SIGKILL just before its n-th call of the system; False if it ends."""
    child = os.fork()
    if child == 0:
        seen = itertools.count(1)

        def audit(event: str, arguments: tuple) -> None:
            if event in CALLS and next(seen) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status == signal.SIGKILL


def test_kill_at_any_call_of_a_seal(tmp_path: Path, rng: random.Random) -> None:
    files, bench = contents(rng), Bench(str(tmp_path / "runs"), tmp_path / "runs")
    wanted = {*files, "record.json", "claim.json"}
    outcomes = []
    for call in itertools.count(rng.randrange(1, 4), step=3):
        artifact = bench.artifact(run=f"c{call}")

        def work(artifact: Artifact = artifact, call: int = call) -> None:
            artifact.claim(IDENTITY, INPUTS)
            artifact.seal(write(tmp_path / f"out{call}", files), facts={}, provenance=PROVENANCE)

        if not killed_at(call, work):
            break
        outcomes.append(artifact.record() is not None)
        if outcomes[-1]:
            check(artifact, tmp_path / "cache", files)
        else:
            with pytest.raises(InputMissing):
                artifact.fetch(tmp_path / "cache")
            shutil.rmtree(tmp_path / f"out{call}", ignore_errors=True)
            work()
            check(artifact, tmp_path / "cache", files)
            left = {each.name for each in (tmp_path / f"runs/c{call}/cold_start").iterdir()}
            assert left - {name.split("/")[0] for name in wanted} == {artifact.place.scratch().name}
    print(f"{len(outcomes)} kills, {sum(outcomes)} of them after the seal")
    assert outcomes.count(False) > 20
    assert outcomes.count(True) > 0
    assert outcomes == sorted(outcomes)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_kill_at_any_call_of_a_checkpoint(
    again: bool, tmp_path: Path, rng: random.Random, capfd: pytest.CaptureFixture
) -> None:
    """again: another live copy of the stage has saved that step already, with other bits."""
    outcomes = []
    for call in itertools.count(rng.randrange(1, 4), step=3):
        artifact = Artifact(str(tmp_path / "runs"), f"c{call}", "joint")
        save(artifact, 1, 2)
        if again:
            artifact.checkpoints(2).save(3, {"other": torch.ones(3)}, {"other": True})
        killed = killed_at(call, lambda artifact=artifact: save(Artifact(artifact.store, artifact.run, "joint"), 3))
        found = Artifact(artifact.store, artifact.run, "joint").checkpoints(2).newest()
        assert same(found, found[0]) or (again and found[2] == {"other": True})
        outcomes.append(found[0])
        if not killed:
            break
        save(artifact, 3, 4)
        assert same(artifact.checkpoints(2).newest(), 4)
    print(f"{len(outcomes) - 1} kills")
    assert set(outcomes) == {2, 3}
    assert again or outcomes == sorted(outcomes)
    assert "DAMAGED" not in capfd.readouterr().err, "a killed writer's checkpoint is invisible, not damaged"


def test_kill_at_random_times(tmp_path: Path, rng: random.Random) -> None:
    """Kills inside a write, too: the child saves big checkpoints for as long as it lives."""
    artifact = Artifact(str(tmp_path / "runs"), "r", "joint")
    artifact.claim(IDENTITY, INPUTS)

    def big(artifact: Artifact, step: int) -> None:
        artifact.checkpoints(2).save(step, {"big": torch.full((1_000_000,), float(step))}, {"step": step})

    began = time.monotonic()
    big(artifact, 1)
    takes, reached = time.monotonic() - began, 1
    for _ in range(12):
        child = os.fork()
        if child == 0:
            mine = Artifact(artifact.store, "r", "joint")
            for step in itertools.count(reached + 1):
                big(mine, step)
        time.sleep(0.02 + rng.uniform(0, 4) * takes)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step, tensors, info = artifact.checkpoints(2).newest()
        assert step >= reached
        assert info == {"step": step}
        assert torch.equal(tensors["big"], torch.full((1_000_000,), float(step)))
        reached = step
    print(f"{reached} steps in 12 lives")
    assert reached > 3
    artifact.place.tidy()
    left = [each.name for each in (tmp_path / "runs/r/joint").glob(f"{ATTEMPT}*")]
    assert left == [artifact.place.scratch().name]


def in_child(work: Callable[[], object]) -> str:
    """Run `work` in a child process; what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        os.waitpid(child, 0)
        return said.read()


def test_a_read_only_store(tmp_path: Path, rng: random.Random) -> None:
    files = contents(rng)
    store = str(tmp_path / "runs")
    sealed(Artifact(store, "r", "joint"), tmp_path / "out", files)
    folders = [tmp_path / "runs", *(each for each in (tmp_path / "runs").rglob("*") if each.is_dir())]
    for each in (*tmp_path.parents, tmp_path):
        if each.stat().st_mode & 0o005 != 0o005:  # pytest's own folders are closed to others
            each.chmod(0o755)
    for each in folders:
        each.chmod(0o555)

    def work() -> None:
        if os.getuid() == 0:  # for whom nothing is read-only
            os.setgid(65534)
            os.setuid(65534)
        check(Artifact(store, "r", "joint"), tmp_path / "cache", files)  # reading is fine
        Artifact(store, "other", "joint").claim(IDENTITY, INPUTS)

    said = in_child(work)
    for each in folders:
        each.chmod(0o755)
    assert said.startswith("StoreError: cannot write"), said
    assert "Permission denied" in said
    assert "--store" in said


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path / "runs"), "r", "joint")
    artifact.claim(IDENTITY, INPUTS)
    save(artifact, 1, 2)
    names = artifact.place.names()

    def work(big: Callable[[Artifact], object]) -> Callable[[], object]:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            big(Artifact(artifact.store, "r", "joint"))

        return limited

    write(tmp_path / "out", {"a": b"a"})
    said = in_child(work(lambda mine: mine.checkpoints(2).save(3, {"x": torch.zeros(100_000)}, {})))
    assert said.startswith("StoreError: cannot write"), said
    said = in_child(work(lambda mine: mine.place.publish("x", lambda file: file.write_bytes(bytes(200_000)))))
    assert said.startswith("StoreError: cannot write"), said
    artifact.place.tidy()
    assert same(artifact.checkpoints(2).newest(), 2)
    assert artifact.place.names() == names
    assert artifact.record() is None


ONE_ITEM = """
import sys
from pathlib import Path
from dmdr.promptset import PromptSet
from tests.support.memory import peak

PromptSet(Path("small"), "train").items([0])  # some kernels then map 50 MB of torch's own code
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
found = PromptSet(Path("large"), "train").items([40])[0]["t5"]
print(peak() - before if bool((found == 40.0).all()) else "another item")
"""


def test_only_the_slices_are_read(tmp_path: Path) -> None:
    """A shard of 64 MB, of which one item is wanted, in a process that has no memory to use again."""
    for name, count in (("small", 1), ("large", 64)):
        items = [{"t5": torch.full((256, 1024), float(n))} for n in range(count)]
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, "train", 0, [{"prompt": str(n)} for n in range(count)], items)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ONE_ITEM]
    grown = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    print(f"{grown.strip()} KiB")
    assert int(grown) < 24 * 1024


def test_a_long_file_streams_in_bounded_memory(tmp_path: Path) -> None:
    """200,000 prompts and a line of 100 MB, in a process of its own: what stays is 8 bytes of digest a prompt."""
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for n in range(200_000):
            file.write(b"a prompt about number %d\n" % n)
            if n == 100_000:
                file.seek(100_000_000, os.SEEK_CUR)  # a hole of NULs, which no disk has to store
                file.write(b"\n")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak()
        tally = Tally()
        number = sum(1 for _ in prompts.select_records(Prompts(sources=[str(path)]), tally, lambda line: None))
        os.write(writer, json.dumps([number, tally.total().bad, peak() - before]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    number, bad, grown = json.loads(os.read(reader, 100))
    print(f"{grown / 1024:.0f} MiB")
    assert (number, bad) == (200_000, 1)
    assert grown < 40 * 1024
