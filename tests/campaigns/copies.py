"""TIMES=20 python -m pytest -s tests/campaigns/copies.py: two and three live copies of a whole run, many times.

Not part of `make test`: minutes a trial. All copies run the five stages of one run in one store at the same time, as
`dmdr run` does: a stage that ends with 75, 74, 70 or a signal is tried again. In every second trial one copy's stage is
killed at a random moment. The result is that of one copy alone, and no stage of a copy ends with another code than 0 or
75, but for the one that was killed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.stages import STAGES
from stages.store.artifacts import Artifact
from tests.support.s3_server import BUCKET
from tests.support.stage_process import Process, command, prepare_host, start

pytestmark = [pytest.mark.process, pytest.mark.timeout(0)]  # it takes as long as it takes
TIMES = int(os.environ.get("TIMES", "20"))
SEED = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
TRIES = 4  # of a stage


class Copy(threading.Thread):
    """One copy of a run: its stages one after another, each tried again. endings: stage and exit code of each try."""

    def __init__(self, config: Path, store: str) -> None:
        super().__init__()
        self.config, self.store = config, store
        self.endings: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.process: Process | None = None

    def run(self) -> None:
        for stage in STAGES:
            for _ in range(TRIES):
                self.process = start(command(stage, self.config, self.store))
                _, err = self.process.communicate(timeout=600)
                self.endings.append((stage, self.process.returncode))
                self.said.append(err)
                if self.process.returncode == 0:
                    break
            else:
                return


def fingerprints(store: str) -> dict[str, str]:
    return {stage: Artifact(store, "tiny", stage).sealed().fingerprint for stage in STAGES}


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_copies_of_a_run(
    kind: str, copies: int, tiny_config: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    prepare_host()
    if kind == "s3":
        request.getfixturevalue("s3")
    rng = random.Random(f"{SEED} {kind} {copies}")
    config = tiny_config()

    def store(name: str) -> str:
        return str(tmp_path / name) if kind == "folder" else f"s3://{BUCKET}/{tmp_path.name}/{name}"

    alone = Copy(config, store("alone"))
    alone.run()
    assert alone.endings == [(stage, 0) for stage in STAGES], alone.said
    expected = fingerprints(store("alone"))
    began, waits, killed = time.monotonic(), 0, 0
    for trial in range(TIMES):
        running = [Copy(config, store(f"{trial}")) for _ in range(copies)]
        for each in running:
            each.start()
        if trial % 2:
            time.sleep(rng.uniform(1.0, 30.0))
            victim = rng.choice(running).process
            if victim is not None and victim.poll() is None:
                os.kill(victim.pid, signal.SIGKILL)
                killed += 1
        for each in running:
            each.join()
        codes = [code for each in running for _, code in each.endings]
        said = [err for each in running for err in each.said]
        waits += sum("standing by" in err for err in said)
        assert set(codes) <= ({0, 75, -signal.SIGKILL} if trial % 2 else {0, 75}), said
        assert codes.count(-signal.SIGKILL) <= 1
        assert fingerprints(store(f"{trial}")) == expected
        left = [name for name in Artifact(store(f"{trial}"), "tiny", "joint").place.names() if "lease" in name]
        assert not left
        print(f"  {kind}, {copies} copies, trial {trial}: codes {sorted(set(codes))}", flush=True)
    print(
        f"{kind}, {copies} copies: {TIMES} trials, one result each; stood by {waits} times, {killed} copies killed, "
        f"{(time.monotonic() - began) / TIMES:.0f} s a trial; seed {SEED}"
    )
