"""TIMES=20 python -m pytest -s tests/campaigns/ranks.py: ranks that are stopped, killed or told to stop, many times.

Not part of `make test`: about TIMES * 2 minutes, most of them waiting. Each trial harms a cold start of two ranks at a
random moment, then checks how it ends and how long that takes, that no process is left, and that the same command goes
on to the same bits as a cold start that nobody harmed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from stages.runtime import ranks as launcher
from stages.runtime import stop_signal
from stages.runtime.watchdog import read_state
from tests.support.stage_process import Process, command, finish, start
from tests.support.trained_run import run_stage
from tests.support.training_results import TRAINING, digests, steps_saved

pytestmark = [pytest.mark.process, pytest.mark.timeout(0)]  # it takes as long as it takes
TIMES = int(os.environ.get("TIMES", "20"))
WATCHDOG = 10  # seconds
SLACK = 10  # seconds, for a busy machine
SEED = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
CHECKPOINTS = "tiny/cold_start/checkpoints"


@pytest.fixture
def config(tiny_config: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    told = "told" in request.node.name  # then the limit after SIGTERM ends it, not the watchdog
    execution = {"device": "cpu", "checkpoint_every": 2, "processes": 2, "watchdog": 600 if told else WATCHDOG}
    return tiny_config(execution=execution, cold_start={**TRAINING, "updates": 40})


@pytest.fixture
def expected(config: Path, tmp_path: Path) -> dict[str, str]:
    """The digests of what an unharmed cold start seals; its prompts are those of every trial."""
    run_stage(load_config(config), tmp_path / "whole", "prompts")
    finish(command("cold_start", config, tmp_path / "whole"))
    return digests(tmp_path / "whole", "cold_start")


def begin(config: Path, whole: Path, store: Path, rng: random.Random) -> tuple[Process, list[int]]:
    """Start a cold start; return it and its ranks at a random moment after the first checkpoint."""
    shutil.copytree(whole / "tiny/prompts", store / "tiny/prompts")
    process = start(command("cold_start", config, store))
    while not steps_saved(store, "cold_start"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 1.5))
    ranks = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return process, ranks


def conclude(process: Process, ranks: list[int], began: float) -> tuple[float, int, str]:
    """Seconds until its end, exit code, last line. No process is left."""
    _, err = process.communicate(timeout=180)
    took = time.monotonic() - began
    time.sleep(0.2)
    assert all(read_state(rank) in ("", "Z", "X") for rank in ranks), "a rank is left"
    return took, process.returncode, (err.splitlines() or [""])[-1]


@pytest.mark.parametrize("harm", ["stopped", "killed", "stopped, then told to stop", "killed, then told to stop"])
def test_a_harmed_rank(harm: str, config: Path, expected: dict[str, str], tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {harm}")
    print(f"\n{harm}: seed {SEED}")
    longest = 0.0
    for trial in range(TIMES):
        store = tmp_path / f"{trial}"
        process, ranks = begin(config, tmp_path / "whole", store, rng)
        victim = rng.choice(ranks) if ranks else 0  # it may have sealed already
        saved = steps_saved(store, "cold_start")
        if process.poll() is None and ranks:
            os.kill(victim, signal.SIGSTOP if "stopped" in harm else signal.SIGKILL)
        told = False
        if "told" in harm:
            time.sleep(rng.uniform(0.0, 1.0))
            told = process.poll() is None  # else the killed rank has ended it already
            process.terminate()
        took, code, line = conclude(process, ranks, time.monotonic())
        print(f"  trial {trial}: exit code {code} after {took:.1f} s; {line}", flush=True)
        check_end(harm, took, code, told=told)
        if code:
            assert steps_saved(store, "cold_start") or not saved, "the checkpoint before survives"
        finish(command("cold_start", config, store))
        assert digests(store, "cold_start") == expected
        longest = max(longest, took)
        shutil.rmtree(store)
    print(f"{harm}: {TIMES} trials, the longest took {longest:.1f} s; all resumed to the same bits")


def check_end(harm: str, took: float, code: int, *, told: bool) -> None:
    if told:  # a stage whose rank was killed may be ending already when the signal comes
        assert code in ((0, 70, 75) if "killed" in harm else (0, 75)), code
        assert took < min(60, stop_signal.TIME + launcher.FOR_KILL + stop_signal.AFTER_RANKS)
    elif "stopped" in harm:
        assert code in (0, 70), code
        assert took < WATCHDOG + SLACK
    else:
        assert code in (0, 70, 137), code
        assert took < launcher.GRACE + SLACK


def test_told_to_stop(config: Path, expected: dict[str, str], tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} told")
    longest = 0.0
    for trial in range(TIMES):
        store = tmp_path / f"{trial}"
        process, ranks = begin(config, tmp_path / "whole", store, rng)
        process.terminate()
        took, code, line = conclude(process, ranks, time.monotonic())
        print(f"  trial {trial}: exit code {code} after {took:.1f} s; {line}", flush=True)
        assert code in (0, 75)
        finish(command("cold_start", config, store))
        assert digests(store, "cold_start") == expected
        longest = max(longest, took)
        shutil.rmtree(store)
    print(f"told to stop: {TIMES} trials, the longest took {longest:.1f} s; all resumed to the same bits")
