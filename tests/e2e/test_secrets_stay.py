"""Secrets of the environment are in nothing that a run writes, prints, sends to Prefect or shows among processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0CANARY0AA",
    "AWS_SECRET_ACCESS_KEY": "canary1-secret-access-key-canary1",
    "AWS_SESSION_TOKEN": "canary2-session-token-canary2",
    "HF_TOKEN": "hf_canary3canary3canary3canary3",
    "PREFECT_API_AUTH_STRING": "admin:canary4-auth-string-canary4",
    "WANDB_API_KEY": "canary5-wandb-key-canary5",
    "MY_PASSWORD": "canary6-password-canary6",
}


@pytest.mark.process
@pytest.mark.e2e
def test_no_secret_of_the_environment_is_written_anywhere(
    tiny_config: Callable[..., Path], prefect_server: dict[str, str], tmp_path: Path
):
    command = [sys.executable, "-m", "flows.cli", "run", str(tiny_config()), "--store", str(tmp_path / "store")]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    loud = {"PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_LOGGING_INTERNAL_LEVEL": "DEBUG", "TMPDIR": str(temporary)}
    run = subprocess.Popen(
        command,
        env={**prefect_server, **CANARIES, **loud},
        stdout=(tmp_path / "out").open("wb"),
        stderr=(tmp_path / "err").open("wb"),
    )
    shown: set[bytes] = set()
    while run.poll() is None:
        shown |= set(list_arguments())
        time.sleep(1)
    told = (tmp_path / "err").read_text()
    assert run.returncode == 0, told
    assert (tmp_path / "store/tiny/evaluate/record.json").exists()
    assert "DEBUG" in told, "Prefect was to say all it can"
    assert any(b"flows.cli" in arguments for arguments in shown)
    read = 0
    folders = (tmp_path, Path(prefect_server["PREFECT_HOME"]))
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        data, read = path.read_bytes(), read + 1
        assert [name for name, value in CANARIES.items() if value.encode() in data] == [], path
    assert read > 60
    assert [name for name, value in CANARIES.items() if any(value.encode() in each for each in shown)] == []


def list_arguments() -> Iterator[bytes]:
    """The command lines of all processes."""
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                yield Path(f"/proc/{process}/cmdline").read_bytes()
            except OSError:  # it has ended
                continue
