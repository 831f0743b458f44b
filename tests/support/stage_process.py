"""Stages as processes: started, run to their end, refused in one line.

Most are forks of one interpreter for each worker of pytest, which has the libraries already: real processes, killed by
real signals, that need no seconds of imports. `stages` starts a new interpreter, for what tests the process itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from dmdr.config.stages import STAGES
from stages.runtime.preloaded import Host, start_host

ROOT = Path(__file__).parents[2]
LIBRARIES = ("s3fs", "transformers.models.clip", "transformers.models.t5", "diffusers.models.transformers")
POLL = 0.01  # seconds


@cache
def prepare_host() -> Host | None:
    """This worker's host, started by the first call; None on a system without.

    The first call has to come from the main thread: the kernel ends the host with the thread that started it.
    """
    assert threading.current_thread() is threading.main_thread(), "call prepare_host before the thread starts"
    modules = (f"stages.{stage}" for stage in STAGES)
    families = (f"dmdr.backbones.{family}" for family in ("sd3", "sdxl", "flux", "z_image"))
    return start_host([*modules, *families, *LIBRARIES])


_one_at_a_time = threading.Lock()  # the host's socket serves one thread; a fake cluster starts its pods in another


class Process:
    """A fork of the host with what the tests use of a Popen. Its output can be read as it comes."""

    def __init__(
        self,
        arguments: list[str],
        *,
        environment: Mapping[str, str],
        folder: Path = ROOT,
        output: int | None = None,
        host: Host | None = None,
        reads: bool = False,
    ) -> None:
        """arguments: a module and its own. output: a file for stdout and stderr; None: two pipes. host: None: the
        worker's. reads: whether its stdin is a pipe, or empty."""
        host = host or prepare_host()
        assert host is not None, "these tests need Linux"
        self.host, self.returncode = host, None
        pipes = [os.pipe(), os.pipe()] if output is None else []
        outputs = [output, output] if output is not None else [writing for _, writing in pipes]
        given, giving = os.pipe()
        self.stdin = os.fdopen(giving, "w")
        if not reads:
            self.stdin.close()
        with _one_at_a_time:
            files = (given, *outputs)
            program = host.start(arguments[0], arguments[1:], files=files, environment=environment, folder=folder)
        self.pid = program.pid
        for file in (given, *(writing for _, writing in pipes)):
            os.close(file)
        self.stdout, self.stderr = [os.fdopen(reading) for reading, _ in pipes] or [None, None]

    def poll(self) -> int | None:
        if self.returncode is None:
            with _one_at_a_time, suppress(TimeoutError):
                self.returncode = self.host.wait(self.pid, 1e-4)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("stages", timeout)
            time.sleep(POLL)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Its stdout and stderr, after its end. It reads no more."""
        self.stdin.close()
        said = ["", ""]

        def read(place: int, file) -> None:
            said[place] = file.read()

        readers = [threading.Thread(target=read, args=each) for each in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                file.close()
        self.wait()


def command(stage: str, config: Path, store: Path) -> list[str]:
    """The module and the arguments that run a stage."""
    return ["stages", stage, "--config", str(config), "--store", str(store)]


def start(arguments: list[str], **environment: str) -> Process:
    """Start a module in the repository's root; its stderr can be read."""
    return Process(arguments, environment={**os.environ, **environment})


def finish(arguments: list[str], code: int = 0) -> str:
    """Run a module to its end, which has to be `code`; its stderr."""
    process = start(arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return err


def run_stages(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m stages` with `arguments` in a folder, as a fork."""
    process = Process(["stages", *arguments], environment=dict(os.environ), folder=cwd)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def stages(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m stages` with `arguments` in a folder, as a new interpreter."""
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
