"""Nobody waits for ever: a rank, a stage or the holder of a lock that stands still, as real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from flows.launch.process import await_end
from stages.runtime.watchdog import read_state
from tests.support.stage_process import Process, command, start
from tests.support.trained_run import seal_stage
from tests.support.training_results import TRAINING

pytestmark = pytest.mark.process
WATCHDOG = 5  # seconds; the least that a config may ask for


@pytest.fixture
def start_ranks(tiny_config: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., tuple[Process, list[int]]]]:
    """Starts a cold start in two ranks and returns after its first checkpoint, with the processes of the ranks."""
    execution = {"device": "cpu", "checkpoint_every": 2, "processes": 2, "watchdog": WATCHDOG}
    config = tiny_config(execution=execution, cold_start={**TRAINING, "updates": 4000})
    seal_stage(load_config(config), tmp_path, "prompts")
    started: list[int] = []

    def run(*before: str) -> tuple[Process, list[int]]:
        process = start([*before, *command("cold_start", config, tmp_path)[bool(before) :]])
        started.append(process.pid)
        await_checkpoint(process, tmp_path)
        ranks = find_children(process.pid)
        started.extend(ranks)
        return process, ranks

    yield run
    for each in started:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def await_checkpoint(process: Process, store: Path) -> None:
    while not list(store.glob("tiny/cold_start/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def find_children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def are_gone(processes: list[int], seconds: float = 5.0) -> bool:
    """Whether they have ended, or do so soon: the kernel tells them that their parent died."""
    deadline = time.monotonic() + seconds
    while any(read_state(each) not in ("", "Z", "X") for each in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def newest_step(store: Path) -> int:
    steps = [path.parent.name for path in store.glob("tiny/cold_start/checkpoints/*/manifest.json")]
    return max(int(step.removeprefix("step-")) for step in steps)


def test_a_stopped_rank_is_named_and_the_stage_ends_with_70(start_ranks) -> None:
    process, ranks = start_ranks()
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
    assert are_gone(ranks)
    assert took < WATCHDOG + 10


def test_sigterm_ends_a_stage_of_which_a_rank_is_stopped(start_ranks, tmp_path: Path) -> None:
    process, ranks = start_ranks("tests.support.hurried_stage", "3")
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(0.5)
    before, began = newest_step(tmp_path), time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 8
    told = [line for line in err.splitlines() if "was told to stop" in line]
    assert len(told) == 1 and "rank" in told[0] and "did not finish within 3 s" in told[0], err
    assert are_gone(ranks)
    assert newest_step(tmp_path) >= before


@pytest.mark.parametrize("stopped", [False, True], ids=["run", "stopped"])
def test_ranks_die_with_the_process_that_started_them(start_ranks, stopped: bool) -> None:
    process, ranks = start_ranks()
    if stopped:
        os.kill(ranks[0], signal.SIGSTOP)
    process.kill()
    process.wait()
    assert are_gone(ranks)


def test_a_killed_rank_is_named(start_ranks) -> None:
    process, ranks = start_ranks()
    os.kill(ranks[0], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=90)
    print(f"{time.monotonic() - began:.1f} s, exit code {process.returncode}")
    assert "cold_start: rank 0 was ended by signal 9 (out of memory, or somebody killed it)" in err
    assert "fault of DMDR" not in err, "the others only lost it"
    assert process.returncode in (70, 137)
    assert are_gone(ranks)


def await_reader(pipe: Path) -> int:
    """A handle that keeps the reader of a pipe waiting, as soon as there is one."""
    for _ in range(600):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.1)
    raise TimeoutError("nobody read it")


@pytest.fixture
def dead_disk(tiny_sd3_folder: Path, tmp_path: Path) -> Path:
    """A teacher's file that never answers: reading it does not return."""
    file = shutil.copytree(tiny_sd3_folder, tmp_path / "teacher") / "vae/config.json"
    file.unlink()
    os.mkfifo(file)
    return file


def name_teacher(file: Path) -> dict[str, object]:
    return {"path": str(file.parents[1]), "guidance_scale": 3.0, "steps": 3}


def test_a_stage_of_one_process_that_stands_still(
    tiny_config: Callable[..., Path], dead_disk: Path, tmp_path: Path
) -> None:
    config = tiny_config(teacher=name_teacher(dead_disk), execution={"device": "cpu", "watchdog": WATCHDOG})
    with start(command("prompts", config, tmp_path / "store")) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 70, err
    assert f"prompts: made no progress for {WATCHDOG} s; the stage was ended" in err.splitlines()[-1]
    assert "read_object" in err, "where it stands"


def test_sigterm_ends_a_stage_whose_disk_never_answers(
    tiny_config: Callable[..., Path], dead_disk: Path, tmp_path: Path
) -> None:
    arguments = command("prompts", tiny_config(teacher=name_teacher(dead_disk)), tmp_path / "store")[1:]
    with start(["tests.support.hurried_stage", "2", *arguments]) as process:
        writer = await_reader(dead_disk)
        process.terminate()
        _, err = process.communicate(timeout=30)
    os.close(writer)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("prompts: was told to stop and did not finish within 2 s, so it was ended")


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_second_copy_stands_by_and_takes_over(tiny_config: Callable[..., Path], tmp_path: Path, end: str) -> None:
    config = tiny_config(cold_start={**TRAINING, "updates": 12}, execution={"device": "cpu", "checkpoint_every": 1})
    seal_stage(load_config(config), tmp_path, "prompts")
    first = start(command("cold_start", config, tmp_path))
    await_checkpoint(first, tmp_path)
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not end before the second stands by
    with start(command("cold_start", config, tmp_path)) as second:
        line = second.stderr.readline()
        assert line.startswith(f"cold_start: process {first.pid} on this machine runs this stage already; standing by")
        getattr(first, end)()
        os.kill(first.pid, signal.SIGCONT)
        first.wait()
        assert first.returncode == {"kill": -signal.SIGKILL, "terminate": 75}[end]
        out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "cold_start: the other copy ended without a seal; taking over" in err
    assert "continues from its checkpoint after update" in err
    assert "sealed at" in out
    assert not [each for each in (tmp_path / "tiny/cold_start").iterdir() if each.name.startswith(".")]
    first.communicate()


def test_a_flow_ends_a_stage_that_somebody_stopped(capfd: pytest.CaptureFixture) -> None:
    child = subprocess.Popen(["sleep", "60"], process_group=0)
    os.kill(child.pid, signal.SIGSTOP)
    assert await_end(child, 1.0, "joint") == 70
    assert f"joint: somebody stopped process {child.pid} (SIGSTOP) for 1 s; it was ended" in capfd.readouterr().err
    quick = subprocess.Popen(["sh", "-c", "exit 3"], process_group=0)
    assert await_end(quick, 1.0, "joint") == 3
