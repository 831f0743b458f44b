"""Short programs of the tests, each a process of its own.

They are forks of one interpreter for each worker of pytest, which has the flows, Prefect and the stores already. Run as
a module, this executes the code that it is given, as `python -c` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

from stages.runtime.preloaded import Host, start_host
from tests.support.stage_process import Process

MODULES = ("s3fs", "safetensors.numpy", "flows.cli", "flows.distil", "flows.launch.kubernetes", "flows.reap")
MODULES += ("flows.retrain", "flows.commands.run", "flows.commands.teachers", "stages.store.published_teachers")


@cache
def prepare_host() -> Host | None:
    """This worker's host for programs. As that of the stages, the main thread has to call this first."""
    return start_host(MODULES)


def start(
    code: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    output: int | None = None,
    reads: bool = False,
) -> Process:
    """Start `python -c code arguments` in the repository's root; as Process has it."""
    environment = os.environ if environment is None else environment
    command = [__name__, code, *arguments]
    return Process(command, environment=environment, output=output, host=prepare_host(), reads=reads)


def run(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python -c code arguments` to its end."""
    with start(code, *arguments, environment=environment) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(["-c", *arguments], process.returncode, out, err)


if __name__ == "__main__":
    if "prefect" in sys.modules:  # it read its settings when the host imported it
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
    program = sys.argv.pop(1)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
