"""A stage as a process of this machine, in a process group of its own.

1. Ctrl-C in a terminal reaches the flow only. The flow sends the stage one SIGTERM and waits for its checkpoint. The
   same happens when Prefect cancels the flow run, which arrives here as an exception.
2. A flow that is killed (SIGKILL) leaves no stage behind: on Linux the kernel then sends the stage SIGTERM, and it
   writes its checkpoint and ends. On other systems it goes on to its seal. The kernel watches the thread that started
   the stage, so this thread has to live as long as the flow: stage tasks are called directly, never submitted.
3. The stages of a flow are forks of one interpreter that has their libraries (`stages.runtime.preloaded`). A stage that
   starts ranks of its own is not: its first process imports nothing heavy.
4. A stage ends itself if it stands still, unless somebody stopped its process (SIGSTOP). That is seen here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

from dmdr.config.load import load_config
from dmdr.config.stages import STAGES, StageName
from dmdr.errors import INTERNAL
from flows.launch.failure import RETRY_DELAYS, StageFailed, announce_retry, check_sealed, is_worth_a_retry
from flows.launch.stage import build_options
from stages.runtime import watchdog
from stages.runtime.events import FLOW
from stages.runtime.parent_death import die_with_parent
from stages.runtime.preloaded import Host, HostDied, start_host
from stages.runtime.watchdog import read_state
from stages.store.artifacts import Artifact

GRACE = 60  # seconds for the last step and the checkpoint of a stage
POLL = 2.0  # seconds between two looks at whether somebody stopped a stage
Say = Callable[[str], None]


class Child(Protocol):
    """A process that a flow started: a Popen, or a fork of the host."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


def run_stage(
    name: StageName,
    config: str,
    run: str,
    store: str,
    teacher: str | None = None,
    adopt: str | None = None,
    *,
    say: Say | None = None,
) -> None:
    """Run one stage to its seal.

    say: gets each line of the stage. If None, the stage writes to our own terminal.

    Raises:
        StageFailed: it exited with another code than 0, or its seal is missing.
    """
    arguments = [name, *build_options(config, run, store, teacher, adopt)]
    execution = load_config(config).execution
    host = _find_host() if execution.processes == 1 else None
    exit_code = run_module("stages", arguments, say=say, host=host, patience=execution.watchdog)
    if exit_code:
        raise StageFailed(name, exit_code, f"exit code {exit_code}", says_more=False)
    check_sealed(Artifact(store, run, name))


def run_stage_with_retries(
    name: StageName, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
) -> None:
    """`run_stage` on our own terminal; tries again where that may help, as the Prefect flow does.

    Raises:
        StageFailed: of the last try.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_worth_a_retry),
        stop=stop_after_attempt(1 + len(RETRY_DELAYS)),
        wait=wait_chain(*map(wait_fixed, RETRY_DELAYS)),
        before_sleep=_announce,
        reraise=True,
    )
    retrying(run_stage, name, config, run, store, teacher, adopt)


def _announce(state: RetryCallState) -> None:
    assert state.outcome is not None, "tenacity calls this after a try"
    failure = state.outcome.exception()
    assert isinstance(failure, StageFailed)
    announce_retry(failure, state.attempt_number)


_hosts: list[Host] = []  # of this process, one at most


def _find_host() -> Host | None:
    """The host of this process's stages, started if it is not there; None where there can be none."""
    if _hosts and not _hosts[0].is_alive():
        _hosts.clear()
    if not _hosts and (host := start_host([f"stages.{stage}" for stage in STAGES])) is not None:
        _hosts.append(host)
    return _hosts[0] if _hosts else None


def run_module(
    module: str, arguments: list[str], *, say: Say | None, host: Host | None = None, patience: float | None = None
) -> int:
    """Run `python -m module arguments` to its end and return its exit code, 128 + n if signal n ended it.

    say: gets each line of the program's stdout and stderr as it comes. If None, the program writes to our own terminal.
    host: forks the program; None: it starts by itself.
    An exception that interrupts the wait is raised again once the program has ended.
    """
    reading, writing = os.pipe() if say is not None else (None, None)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", FLOW: "1"}
    with open(os.devnull) as nothing:
        files = (nothing.fileno(), 1 if writing is None else writing, 2 if writing is None else writing)
        child: Child
        if host is None:
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=files[0],
                stdout=files[1],
                stderr=files[2],
                process_group=0,
                env=environment,
                preexec_fn=die_with_parent(),
            )
        else:
            child = host.start(module, arguments, files=files, environment=environment)
    if writing is not None:
        os.close(writing)
    reader = Thread(target=_forward, args=(reading, say), daemon=True)
    reader.start()
    try:
        code = child.wait() if patience is None else await_end(child, patience, arguments[0])
    except HostDied:
        code = -signal.SIGKILL
    except BaseException:
        _stop(child)
        raise
    finally:
        reader.join(timeout=5)  # a process that outlives the stage may keep the pipe open
    return code if code >= 0 else 128 - code


def _forward(reading: int | None, say: Say | None) -> None:
    if reading is not None and say is not None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                say(line.rstrip("\n"))


def await_end(child: Child, patience: float, stage: str) -> int:
    """Wait for the end of a stage; kill it with its ranks when somebody has stopped it for `patience` seconds."""
    running = time.monotonic()  # when it was last seen not to be stopped
    while True:
        with suppress(TimeoutError, subprocess.TimeoutExpired):
            return child.wait(POLL)
        if read_state(child.pid) not in ("T", "t"):
            running = time.monotonic()
        elif time.monotonic() - running > patience:
            watchdog.say(stage, f"somebody stopped process {child.pid} (SIGSTOP) for {patience:g} s; it was ended")
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return INTERNAL


def _stop(child: Child) -> None:
    """Send SIGTERM, wait GRACE seconds for the checkpoint, then kill the group. Returns when the child is gone."""
    child.terminate()
    try:
        child.wait(GRACE)
    except HostDied:  # and told it to stop
        return
    except BaseException:  # it takes too long, or a second interrupt comes; the caller raises the first
        with suppress(ProcessLookupError, HostDied):
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
