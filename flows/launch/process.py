"""A stage as a process of this machine, in a process group of its own.

1. Ctrl-C in a terminal reaches the flow only. The flow sends the stage one SIGTERM and waits for its checkpoint. The
   same happens when Prefect cancels the flow run, which arrives here as an exception.
2. A flow that is killed (SIGKILL) leaves no stage behind: on Linux the kernel then sends the stage SIGTERM, and it
   writes its checkpoint and ends. On other systems it goes on to its seal. The kernel watches the thread that started
   the stage, so this thread has to live as long as the flow: stage tasks are called directly, never submitted.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from threading import Thread

from stages.runtime.ranks import die_with_parent

GRACE = 60  # seconds for the last step and the checkpoint of a stage


def run_process(command: list[str], say: Callable[[str], None] | None) -> int:
    """Run a command to its end and return its exit code, 128 + n if signal n ended it.

    say: gets each line of the command's stdout and stderr as it comes. If None, the command writes to our own terminal.
    An exception that interrupts the wait is raised again once the command has ended.
    """
    output = None if say is None else subprocess.PIPE
    errors = None if say is None else subprocess.STDOUT
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        text=True,
        errors="replace",
        process_group=0,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=die_with_parent(),
    )
    reader = Thread(target=_forward, args=(child, say), daemon=True)
    reader.start()
    try:
        code = child.wait()
    except BaseException:
        _stop(child)
        raise
    finally:
        reader.join(timeout=5)  # a process that outlives the stage may keep the pipe open
    return code if code >= 0 else 128 - code


def _forward(child: subprocess.Popen[str], say: Callable[[str], None] | None) -> None:
    if child.stdout is not None and say is not None:
        for line in child.stdout:
            say(line.rstrip("\n"))


def _stop(child: subprocess.Popen[str]) -> None:
    """Send SIGTERM, wait GRACE seconds for the checkpoint, then kill the group. Returns when the child is gone."""
    child.terminate()
    try:
        child.wait(GRACE)
    except BaseException:  # it takes too long, or a second interrupt comes; the caller raises the first
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
