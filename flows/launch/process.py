"""A stage as a process of this machine, in a process group of its own.

1. Ctrl-C in a terminal reaches the flow only; the flow asks the stage to stop with SIGTERM, once, and waits for the
   checkpoint. The same happens when Prefect cancels the flow run, which arrives here as an exception.
2. A flow that dies without a word (SIGKILL) leaves no orphan at work: on Linux the kernel then sends the stage SIGTERM,
   and it checkpoints and ends. Elsewhere the stage goes on to its seal. The kernel watches the thread that started the
   stage, so that has to be one that lives as long as the flow: stage tasks are called directly, never submitted.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from threading import Thread

from stages.runtime.ranks import die_with_parent

GRACE = 60  # seconds a stage has for its last step and its checkpoint


def run_process(command: list[str], say: Callable[[str], None] | None) -> int:
    """Run a command to its end and return its exit code, 128 + n if signal n ended it.

    say: gets each line of the command's stdout and stderr as it comes. None: the command writes to our own terminal.
    Whatever interrupts the wait is raised again once the command has ended.
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
        reader.join(timeout=5)  # a process that the stage left behind may keep the pipe open
    return code if code >= 0 else 128 - code


def _forward(child: subprocess.Popen[str], say: Callable[[str], None] | None) -> None:
    if child.stdout is not None and say is not None:
        for line in child.stdout:
            say(line.rstrip("\n"))


def _stop(child: subprocess.Popen[str]) -> None:
    """SIGTERM, GRACE seconds for the checkpoint, then SIGKILL to the whole group; returns when the child is gone."""
    child.terminate()
    try:
        child.wait(GRACE)
    except BaseException:  # too long, or asked to stop a second time; the caller raises what came first
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
