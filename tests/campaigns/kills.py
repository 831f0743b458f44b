"""KILLS=100 python -m pytest -s tests/campaigns/kills.py: whole runs that are killed at random moments, many times.

Not part of `make test`. Stages are processes that are killed by SIGKILL at a random moment and started again by the
same command, until the run is whole; then the next run begins. On S3 a proxy refuses, cuts or loses three requests in
ten. Each run has the fingerprints of one that nobody harmed, each update once in its metrics, and no damaged checkpoint
on the way.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dmdr.config.stages import STAGES
from stages.store.artifacts import Artifact
from tests.support.s3_proxy import s3_proxy
from tests.support.s3_server import BUCKET
from tests.support.stage_process import command, finish, prepare_host, start
from tests.support.training_results import TRAINING

pytestmark = [pytest.mark.process, pytest.mark.timeout(0)]  # it takes as long as it takes
KILLS = int(os.environ.get("KILLS", "100"))
SEED = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
UPDATES = {"cold_start": 12, "joint": 8}
SHARE = 0.75  # of the attempts that are killed


def fingerprints(store: str) -> dict[str, str]:
    return {stage: Artifact(store, "tiny", stage).sealed().fingerprint for stage in STAGES}


def list_updates(store: str, stage: str, cache: Path) -> list[int]:
    """The updates in the metrics of a training stage, in their order."""
    folder = Artifact(store, "tiny", stage).fetch(cache / stage, lambda name: name == "metrics.jsonl")
    return [json.loads(line)["update"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_in_trouble(config: Path, store: str, times: dict[str, float], rng: random.Random) -> tuple[int, list[str]]:
    """Run the stages, killing most attempts at a random moment. Returns the number of kills and what was said."""
    kills, said = 0, []
    for stage in STAGES:
        while True:
            process = start(command(stage, config, store))
            deadline = time.monotonic() + rng.uniform(0.0, 1.2 * times[stage])
            is_victim = rng.random() < SHARE
            while is_victim and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            if is_victim and process.poll() is None:
                process.kill()
                kills += 1
            _, err = process.communicate(timeout=600)
            said.append(err)
            assert process.returncode in (0, -9, 74), err
            if process.returncode == 0:
                break
    return kills, said


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_killed_runs(
    kind: str, tiny_config: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    prepare_host()
    server = request.getfixturevalue("s3") if kind == "s3" else None
    rng = random.Random(f"{SEED} {kind}")
    joint_rl = {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}}
    config = tiny_config(
        cold_start={**TRAINING, "updates": UPDATES["cold_start"]},
        joint={**TRAINING, "updates": UPDATES["joint"], "rl": joint_rl},
        execution={"device": "cpu", "checkpoint_every": 2},
    )

    def store(name: object) -> str:
        return str(tmp_path / f"{name}") if kind == "folder" else f"s3://{BUCKET}/{tmp_path.name}/{name}"

    times: dict[str, float] = {}
    for stage in STAGES:
        began = time.monotonic()
        finish(command(stage, config, store("whole")))
        times[stage] = time.monotonic() - began
    expected = fingerprints(store("whole"))
    trouble = nullcontext() if server is None else s3_proxy(server, SEED)
    kills, runs, began = 0, 0, time.monotonic()
    with trouble as faults:
        if faults is not None:
            faults.busy, faults.cut, faults.lost = 0.2, 0.05, 0.05
        while kills < KILLS:
            more, said = run_in_trouble(config, store(runs), times, rng)
            kills, runs = kills + more, runs + 1
            assert not [err for err in said if "DAMAGED" in err or "Traceback" in err], said
            assert fingerprints(store(runs - 1)) == expected
            for stage, updates in UPDATES.items():
                assert list_updates(store(runs - 1), stage, tmp_path / f"cache{runs}") == list(range(updates))
            print(f"  {kind}, run {runs}: {more} kills", flush=True)
    took = time.monotonic() - began
    print(f"{kind}: {kills} kills in {runs} runs, each update once, the same results; {took:.0f} s; seed {SEED}")
