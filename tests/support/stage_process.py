"""Stages as processes of their own: started, run to their end, refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(stage: str, config: Path, store: Path) -> list[str]:
    """Python's arguments that run a stage."""
    return ["-m", "stages", stage, "--config", str(config), "--store", str(store)]


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    """Start Python with `arguments` in the repository's root; its stderr can be read."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def finish(arguments: list[str], code: int = 0) -> str:
    """Run Python with `arguments` to its end, which has to be `code`; its stderr."""
    process = start(arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return err


def stages(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m stages` with `arguments` in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def refused(done: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    """Assert that it ended with `code` and one line, which has all the parts."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.stdout == ""
