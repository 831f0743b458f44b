"""Whatever ends a stage or a command is one line with its own exit code; a stack is in a file of its owner."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmdr.errors import DataError, doing
from flows import cli
from stages.runtime.last_wall import describe_end, end_program

ROOT = Path(__file__).parents[4]
TOKEN = "hf_" + "Ca7ary" * 6


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def fail(error: BaseException) -> BaseException:
    """The error as it arrives at the top: raised, and noted by those who knew what they were doing."""
    try:
        with doing("training joint, update 7"), doing("loading the reward pickscore"):
            raise error
    except BaseException as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("two\nlines \x1b[2J"), 65, r"two lines \\x1b\[2J"),
        (KeyboardInterrupt(), 75, "stopped by Ctrl-C; repeat the command to go on"),
        (OSError(28, "No space left on device"), 74, "cannot write: .*No space left on device; free some space"),
        (MemoryError(), 70, "out of memory while training joint, update 7, while loading .*; dmdr plan CONFIG shows"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 70, "out of memory.*CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 70, "out of memory while training"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            66,
            "torch is not installed here.*dmdr-train",
        ),
        (ModuleNotFoundError("No module named 'dmdr.x'", name="dmdr.x"), 70, "a fault of DMDR while training joint"),
        (
            KeyError("\n\x1b[31m" + "x" * 10**6),
            70,
            r"fault of DMDR while training joint, update 7, while loading the reward pickscore: KeyError: .*x…",
        ),
        (RuntimeError(""), 70, r"pickscore: RuntimeError; its stack is in /.*\.log$"),
        (RecursionError("maximum recursion depth exceeded"), 70, "RecursionError: maximum recursion"),
        (ValueError(f"no {TOKEN} at https://me:pw@h/x"), 70, r"ValueError: no \*\*\* at https://\*\*\*@h/x;"),
    ],
)
def test_each_end_is_one_line(error: BaseException, code: int, line: str, logs: Path, capsys: pytest.CaptureFixture):
    assert end_program("joint", fail(error)) == code
    told = capsys.readouterr().err
    assert re.search(line, told.rstrip("\n")) and told.startswith("joint: ")
    assert told.count("\n") == 1 and "\x1b" not in told and len(told) < 2500
    kept = list(logs.glob("*.log"))
    assert len(kept) == ("its stack is in" in told)
    for file in kept:
        text = file.read_text()
        assert str(file) in told and file.stat().st_mode & 0o777 == 0o600
        assert "Traceback (most recent call last)" in text and TOKEN not in text and "me:pw" not in text


def test_a_stack_that_cannot_be_kept_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    assert "its stack could not be written" in describe_end(fail(RuntimeError("a bug")), "joint").line


def test_the_line_names_the_place_in_this_project(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("dmdr.config.load.Config", None)
    assert cli.main(["run", "quickstart", "--dry-run"]) == 70
    told = capsys.readouterr().err
    place = r"\(dmdr/config/load.py:\d+\)"
    assert re.search(rf"^dmdr: a fault of DMDR while running dmdr run: AttributeError: .* {place}; its stack", told)


@pytest.mark.parametrize(("stopped", "code"), [(KeyboardInterrupt(), 75), (EOFError(), 64)])
def test_an_interrupt_is_told(
    stopped: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def stop(store: str) -> int:
        raise stopped

    monkeypatch.setattr("flows.commands.store.print_runs", stop)
    assert cli.main(["runs"]) == code
    assert capsys.readouterr().err.count("\n") == 1 + (code == 64)


@pytest.mark.process
def test_without_torch_a_command_says_what_is_missing(tmp_path: Path):
    """As in the image dmdr-flow."""
    code = "import sys; sys.modules['torch'] = None; from flows.cli import main; sys.exit(main(sys.argv[1:]))"
    for command in (["generate", "x.yaml", "a cat"], ["stage", "prompts", "--config", "quickstart.yaml"]):
        if command[0] == "generate":
            (tmp_path / "x.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
        else:
            command = [*command[:-1], str(tmp_path / "x.yaml")]
        ended = subprocess.run(
            [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, env=environment()
        )
        assert ended.returncode == 66, ended.stderr
        assert ended.stderr.count("\n") == 1 and "torch is not installed here" in ended.stderr


@pytest.mark.process
def test_a_reader_that_goes_away_and_a_full_disk(tmp_path: Path):
    """`dmdr schema | head -1` ends well; `dmdr schema > /dev/full` does not, and says so."""
    dmdr = f"{sys.executable} -m flows.cli schema"
    ended = subprocess.run(
        ["bash", "-c", f"{dmdr} | head -1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, env=environment()
    )
    assert (ended.stdout.splitlines()[-1], ended.stderr) == ("0", "")
    ended = subprocess.run(["bash", "-c", f"{dmdr} > /dev/full"], capture_output=True, text=True, env=environment())
    assert (ended.returncode, ended.stderr.count("\n")) == (74, 1) and "No space left" in ended.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_names_from_a_store_reach_the_terminal_escaped(tmp_path: Path, capsys: pytest.CaptureFixture):
    for stage in ("prompts", "joint"):
        (tmp_path / "runs/my-run" / stage).mkdir(parents=True)
    assert cli.main(["status", "x\x1b]0;owned\x07\u202e", "--store", str(tmp_path / "runs")]) in (64, 66)
    assert cli.main(["runs", "--store", f"{tmp_path}/\x1b[2Jgone"]) in (0, 66)
    assert cli.main(["run", f"{tmp_path}/\x1b[31mno\nsuch.yaml"]) == 66
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "\\x1b[2Jgone" in told.out + told.err
    assert told.err.count("\n") <= 3
