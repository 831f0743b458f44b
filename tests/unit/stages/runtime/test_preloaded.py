"""Programs that a host forks: processes like any other, and ended with the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.runtime.preloaded import Host, HostDied, Program

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="a host forks on Linux only"),
]
PROGRAM = """
import json, os, signal, sys, time
print(json.dumps({
    "name": __name__, "argv": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ),
    "group": os.getpgrp(), "pid": os.getpid(), "preloaded": "colorsys" in sys.modules, "stdin": sys.stdin.read(),
}))
if sys.argv[1:] == ["wait"]:
    signal.signal(signal.SIGTERM, lambda *_: (open("stopped", "w").close(), sys.exit(75)))
    open("waits", "w").close()
    time.sleep(60)
sys.exit(len(sys.argv))
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = Host(["colorsys"])  # a module that nothing else imports
    yield started
    started.close()


def fork(host: Host, folder: Path, *arguments: str, **environment: str) -> tuple[Program, Path]:
    """Start the program in a folder; its output goes to a file."""
    out = folder / f"out-{len(arguments)}"
    with open(out, "w") as file, open(os.devnull) as nothing:
        files = (nothing.fileno(), file.fileno(), file.fileno())
        return host.start("program", arguments, files=files, environment=environment, folder=folder), out


def test_a_fork_is_a_program_of_its_own(host: Host, tmp_path: Path):
    program, out = fork(host, tmp_path, "one", "two", WORD="said")
    assert program.wait(60) == 3
    told = json.loads(out.read_text())
    assert told == {
        "name": "__main__",
        "argv": ["one", "two"],
        "folder": str(tmp_path),
        "environment": {"WORD": "said"},
        "group": program.pid,
        "pid": program.pid,
        "preloaded": True,
        "stdin": "",
    }


def test_a_signal_ends_one_program_and_not_its_neighbour(host: Host, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    killed, _ = fork(host, first, "wait")
    stopped, _ = fork(host, second, "wait")
    appears(first / "waits")
    appears(second / "waits")
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    with pytest.raises(TimeoutError):
        stopped.wait(0.05)
    stopped.terminate()
    assert stopped.wait(60) == 75
    assert (second / "stopped").exists() and not (first / "stopped").exists()
    stopped.terminate()  # it has ended: nothing to do


def test_a_program_is_told_to_stop_when_its_host_dies(host: Host, tmp_path: Path):
    program, _ = fork(host, tmp_path, "wait")
    appears(tmp_path / "waits")
    os.kill(host._process.pid, signal.SIGKILL)
    with pytest.raises(HostDied):
        program.wait(60)
    appears(tmp_path / "stopped")
    assert not host.is_alive()
    with pytest.raises(HostDied):
        fork(host, tmp_path)


def test_a_host_ends_with_the_process_that_started_it(tmp_path: Path):
    starts = "from stages.runtime.preloaded import Host; print(Host(['colorsys'])._process.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", starts], stdin=-1, stdout=-1, text=True) as starter:
        host = int(starter.stdout.readline())
        assert Path(f"/proc/{host}").exists()
        starter.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{host}").exists() and _state(host) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_where_cuda_was_asked_for_before_the_fork_a_fresh_interpreter_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stand-in for torch says so: here is no GPU that could."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "spoils.py").write_text(
        "import colorsys, sys, types\n"
        "cuda = types.SimpleNamespace(_is_in_bad_fork=lambda: True)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    host = Host(["spoils"])
    program, out = fork(host, tmp_path, "one", PYTHONPATH=str(tmp_path))
    assert program.wait(60) == 2
    told = json.loads(out.read_text())
    assert (told["argv"], told["group"], told["preloaded"]) == (["one"], program.pid, False)
    host.close()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def appears(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
