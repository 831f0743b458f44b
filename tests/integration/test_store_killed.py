"""A store whose writers are killed: an artifact is whole or not there, and the same command makes it whole."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path

import pytest

from dmdr.errors import InputMissing
from stages.store.artifacts import Artifact
from tests.support import program
from tests.support.s3_server import BUCKET
from tests.support.sealing import PROVENANCE
from tests.support.stage_process import Process
from tests.support.store_bench import IDENTITY, INPUTS, Bench, check, sealed, write

pytestmark = pytest.mark.process

KILLED_ON_S3 = """
import sys
from pathlib import Path
from stages.store.artifacts import Artifact
from tests.support.sealing import PROVENANCE
artifact = Artifact(sys.argv[1], "r", "joint")
artifact.claim({"a": 1}, {})
print("go", flush=True)
artifact.seal(Path(sys.argv[2]), facts={}, provenance=PROVENANCE)
"""


def test_kill_while_sealing_on_s3(s3: str, tmp_path: Path, rng: random.Random) -> None:
    files = {f"f{n}": rng.randbytes(1000) for n in range(12)}
    out = write(tmp_path / "out", files)
    for trial in range(2):
        store = f"s3://{BUCKET}/killed{trial}"
        with program.start(KILLED_ON_S3, store, str(out)) as child:
            assert child.stdout.readline() == "go\n"
            time.sleep(rng.uniform(0.0, 0.12))
            child.kill()
        artifact = Artifact(store, "r", "joint")
        if artifact.record() is None:
            with pytest.raises(InputMissing):
                artifact.fetch(tmp_path / "no")
            artifact.seal(out, facts={}, provenance=PROVENANCE)
        check(artifact, tmp_path / f"cache{trial}", files)


ADOPTS = """
import json, sys
from stages.store.artifacts import Artifact
url, identity, inputs = sys.argv[1], *map(json.loads, sys.argv[2:])
print("go", flush=True)
Artifact(url, "r", "cold_start").adopt(Artifact(url, "maker", "cold_start"), identity, inputs)
"""


def test_kill_while_adopting(bench: Bench, tmp_path: Path, rng: random.Random) -> None:
    """Nothing, or all of it; and the same command again makes it whole."""
    files = {f"f{n}": rng.randbytes(20_000) for n in range(12)}
    theirs = sealed(bench.artifact("maker"), tmp_path / "out", files)
    for trial in range(3):
        with program.start(ADOPTS, bench.url, json.dumps(IDENTITY), json.dumps(INPUTS)) as child:
            assert child.stdout.readline() == "go\n"
            time.sleep(rng.uniform(0.0, 0.3))
            child.kill()
        if bench.artifact().record() is not None:
            check(bench.artifact(), tmp_path / f"cache-{trial}", files)
    ours = bench.artifact().adopt(bench.artifact("maker"), IDENTITY, INPUTS)
    assert ours.fingerprint == theirs.fingerprint
    check(bench.artifact(), tmp_path / "cache", files)


def test_kills_full_disks_and_memory() -> None:
    """tests/integration/forked.py in a fork of the host, which has no threads that a fork would leave behind."""
    memory = "/dev/shm" if os.path.ismount("/dev/shm") else None  # a kill does not care how fast the disk is
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        options = ["-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/t"]
        with Process(["pytest", *options, "tests/integration/forked.py"], environment=os.environ) as tests:
            print(*tests.communicate(timeout=600))
    assert tests.returncode == 0
