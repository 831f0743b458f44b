"""Nobody waits for ever: a rank, a stage or the holder of a lock that stands still, as real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from stages.runtime.watchdog import read_state
from tests.support.stage_process import Process, command, start
from tests.support.trained_run import run_stage
from tests.support.training_results import TRAINING

pytestmark = pytest.mark.process
WATCHDOG = 5  # seconds; the least that a config may ask for


@pytest.fixture
def running_ranks(tiny_config: Callable[..., Path], tmp_path: Path):
    """A cold start in two ranks, after its first checkpoint, and the processes of the ranks."""
    execution = {"device": "cpu", "checkpoint_every": 2, "processes": 2, "watchdog": WATCHDOG}
    config = tiny_config(execution=execution, cold_start={**TRAINING, "updates": 4000})
    run_stage(load_config(config), tmp_path, "prompts")
    process = start(command("cold_start", config, tmp_path))
    await_checkpoint(process, tmp_path)
    ranks = find_children(process.pid)
    yield process, ranks
    for each in (*ranks, process.pid):
        end(each)


def await_checkpoint(process: Process, store: Path) -> None:
    while not list(store.glob("tiny/cold_start/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def find_children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def end(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def is_gone(process: int) -> bool:
    return read_state(process) in ("", "Z", "X")


def test_a_stopped_rank_is_named_and_the_stage_ends_with_70(running_ranks) -> None:
    process, ranks = running_ranks
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    print(f"{took:.1f} s\n{err}")
    assert process.returncode == 70
    last = err.splitlines()[-1]
    assert f"cold_start: rank 1 made no progress for {WATCHDOG}" in last
    assert f"somebody stopped process {ranks[1]} (SIGSTOP)" in last
    assert f"the stacks of rank 0 (process {ranks[0]}):" in err
    assert "all_reduce" in err, "the stack of the rank that waits"
    assert f"rank 1 (process {ranks[1]}) is stopped and cannot show its stacks" in err
    assert all(map(is_gone, ranks))
    assert took < WATCHDOG + 10
