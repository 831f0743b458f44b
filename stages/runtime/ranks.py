"""A stage in several processes (ranks), one a GPU, of this machine or of several.

1. `python -m stages` starts them itself. torchrun turns every exit code into 1, kills ranks 30 s after a SIGTERM, even
   if their checkpoint needs longer, and prints a report of its own over the one line that says what was wrong.
2. They read the environment variables that torchrun would set, so torchrun can start them too.
3. On several machines each gets NNODES, its NODE_RANK, and the address of the first in MASTER_ADDR and MASTER_PORT.
4. SIGTERM is passed on to all ranks and only raises flags. They compare these before each update and leave together.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from dmdr.config.run import Config
from dmdr.config.stages import TABLE, StageName
from dmdr.errors import MOST_TELLING, ConfigError, Stopped

GRACE = 60  # seconds for a rank to end after another has failed; one that waits for a sum never looks at its flag
POLL = 0.05  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def own_rank() -> int | None:
    """Which of several ranks this process is; None if it was started alone."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def count_processes(config: Config, stage: StageName) -> int:
    """How many ranks this process has to start for this stage; 0 if it is a rank itself or does the work alone.

    Raises:
        ConfigError: torchrun started a stage that runs in one process, or another number than the config asks for.
    """
    if own_rank() is None:
        here = _count_here(config, stage)
        alone = not TABLE[stage].in_ranks or here * count_nodes() == 1
        return 0 if alone else here
    if not TABLE[stage].in_ranks and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(f"{stage} runs in one process, torchrun started {os.environ['WORLD_SIZE']}; start it alone")
    here, asked = int(os.environ["LOCAL_WORLD_SIZE"]), config.execution.processes
    if asked not in (1, here):
        raise ConfigError(
            f"execution.processes is {asked}, and torchrun started {here} on this machine; give --nproc-per-node "
            f"{asked}, or leave execution.processes out"
        )
    return 0


def _count_here(config: Config, stage: StageName) -> int:
    """execution.processes; of an evaluation, whose result does not depend on it, no more than there are GPUs."""
    asked = config.execution.processes
    if stage != "evaluate" or asked == 1 or config.execution.device == "cpu":
        return asked
    import torch  # late: a training stage that is started in ranks has no use for it here

    return min(asked, torch.cuda.device_count() or asked)


def count_nodes() -> int:
    """How many machines share the stage."""
    return int(os.environ.get("NNODES", "1"))


def join_ranks(device: str) -> None:
    """Make this process one of the ranks, if it is one."""
    if own_rank() is not None:
        from dmdr import distributed

        distributed.join(device, int(os.environ["LOCAL_RANK"]))


def run_ranks(ranks: int, arguments: list[str], asked_to_stop: list[int]) -> int:
    """Run `python -m stages` with these arguments as so many ranks; returns the exit code that tells most.

    asked_to_stop: grows with each signal that this process receives.
    """
    shared = _build_environment(ranks)
    before = ranks * int(os.environ.get("NODE_RANK", "0"))  # ranks of the machines before this one
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "stages", *arguments],
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent(),
            env={**shared, "RANK": str(before + n), "LOCAL_RANK": str(n)},
        )
        for n in range(ranks)
    ]
    passed_on = 0  # signals
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        failed = deadline is None and any(child.poll() for child in children)
        if failed:
            deadline = time.monotonic() + GRACE
        if failed or len(asked_to_stop) > passed_on:
            passed_on = len(asked_to_stop)
            _signal(children, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _signal(children, signal.SIGKILL)
        time.sleep(POLL)
    return worst_exit_code([child.returncode for child in children])


def _build_environment(ranks: int) -> dict[str, str]:
    """What all ranks of this machine find in their environment."""
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


def _signal(children: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def worst_exit_code(codes: list[int]) -> int:
    """One exit code of many; 128 + n where signal n ended a rank and nothing tells more."""
    bad = [code for code in codes if code]
    for code in MOST_TELLING:
        if code in bad:
            return code
    # the second: our own signal met a rank that was ending already
    told_to_end = (Stopped.exit_code, -signal.SIGTERM)
    code = next((code for code in bad if code not in told_to_end), max(bad, default=0))
    return code if code >= 0 else 128 - code


def die_with_parent() -> Callable[[], None] | None:
    """A function for a child to run before exec: the kernel will send it SIGTERM when this process dies.

    libc is loaded before the fork: after it nothing may take a lock.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
