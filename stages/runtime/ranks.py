"""Run a stage in several processes (ranks), one for each GPU, on one machine or on several.

1. `python -m stages` starts the ranks itself. torchrun would turn every exit code into 1, kill the ranks 30 s after a
   SIGTERM even if their checkpoint needs longer, and hide the one line that says what is wrong behind its own report.
2. The ranks read the environment variables that torchrun sets, so torchrun can start them too.
3. On several machines, each machine gets NNODES, its NODE_RANK, and the address of the first machine in MASTER_ADDR and
   MASTER_PORT.
4. SIGTERM is passed on to all ranks, where it only raises a flag. The ranks compare their flags before each update, so
   that all of them stop at the same step.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dmdr.config.stages import TABLE, StageName
from dmdr.errors import MOST_TELLING, ConfigError, Stopped
from stages.runtime import preloaded
from stages.runtime.parent_death import die_with_parent

if TYPE_CHECKING:
    from dmdr.config.run import Config

GRACE = 60  # seconds; then the ranks left after a failure are killed: one that waits for a sum never sees its flag
POLL = 0.05  # seconds


class Child(Protocol):
    """The process of a rank: a Popen, or a fork of this process."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...


def read_rank() -> int | None:
    """The rank of this process; None if it was started alone."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def count_processes(config: Config, stage: StageName) -> int:
    """Count the ranks that this process has to start for a stage; 0 if it is a rank itself or works alone.

    Raises:
        ConfigError: torchrun started several ranks of a stage that runs in one process, or another number of ranks than
            the config asks for.
    """
    if read_rank() is None:
        here = _count_here(config, stage)
        alone = not TABLE[stage].in_ranks or here * count_nodes() == 1
        return 0 if alone else here
    if not TABLE[stage].in_ranks and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(
            f"{stage} runs in one process, but torchrun started {os.environ['WORLD_SIZE']}; start it without torchrun"
        )
    started, wanted = int(os.environ["LOCAL_WORLD_SIZE"]), config.execution.processes
    if wanted not in (1, started):
        raise ConfigError(
            f"execution.processes is {wanted}, but torchrun started {started} on this machine; give --nproc-per-node "
            f"{wanted}, or leave execution.processes out"
        )
    return 0


def _count_here(config: Config, stage: StageName) -> int:
    """The ranks on this machine: execution.processes. An evaluation on GPUs starts no more ranks than there are GPUs,
    because its result does not depend on their number.
    """
    wanted = config.execution.processes
    if stage != "evaluate" or wanted == 1 or config.execution.device == "cpu":
        return wanted
    import torch  # late: the process that starts the ranks of a training stage does not need it

    return min(wanted, torch.cuda.device_count() or wanted)


def count_nodes() -> int:
    """Count the machines that share the stage."""
    return int(os.environ.get("NNODES", "1"))


def join_ranks(device: str) -> None:
    """Join the process group, if this process is one of several ranks."""
    if read_rank() is not None:
        from dmdr import distributed

        distributed.join(device, int(os.environ["LOCAL_RANK"]))


def run_ranks(ranks: int, arguments: list[str], stop_signals: list[int]) -> int:
    """Run `python -m stages` with these arguments in `ranks` processes; returns the most telling exit code.

    stop_signals: grows with each signal that this process receives.
    """
    shared = _build_environment(ranks)
    before = ranks * int(os.environ.get("NODE_RANK", "0"))  # ranks of the machines before this one
    children = [_start_rank(arguments, {**shared, "RANK": str(before + n), "LOCAL_RANK": str(n)}) for n in range(ranks)]
    passed_on = 0  # signals
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        failed = deadline is None and any(child.poll() for child in children)
        if failed:
            deadline = time.monotonic() + GRACE
        if failed or len(stop_signals) > passed_on:
            passed_on = len(stop_signals)
            _signal(children, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _signal(children, signal.SIGKILL)
        time.sleep(POLL)
    return pick_exit_code([child.returncode or 0 for child in children])


def _start_rank(arguments: list[str], environment: dict[str, str]) -> Child:
    """A process of one rank: a fork of this one if that has the libraries already, else one that imports them."""
    if preloaded.is_ready_to_fork():
        return preloaded.fork_module("stages", arguments, environment)
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *arguments],
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),
        env=environment,
    )


def _build_environment(ranks: int) -> dict[str, str]:
    """The environment that all ranks of this machine share."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "WORLD_SIZE": str(ranks * count_nodes()),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return environment if count_nodes() > 1 else {**environment, **_pick_meeting_point()}


def _pick_meeting_point() -> dict[str, str]:
    """A free port of this machine, where the ranks find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def _signal(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def pick_exit_code(codes: list[int]) -> int:
    """The most telling of the ranks' exit codes; 128 + n if signal n ended a rank and no other code tells more."""
    bad = [code for code in codes if code]
    for code in MOST_TELLING:
        if code in bad:
            return code
    # -SIGTERM: our own signal reached a rank that had no handler any more, because it was ending
    stopped = (Stopped.exit_code, -signal.SIGTERM)
    code = next((code for code in bad if code not in stopped), max(bad, default=0))
    return code if code >= 0 else 128 - code
