"""Run a stage in several processes (ranks), one for each GPU, on one machine or on several.

1. `python -m stages` starts the ranks itself. torchrun would turn every exit code into 1, kill the ranks 30 s after a
   SIGTERM even if their checkpoint needs longer, and hide the one line that says what is wrong behind its own report.
2. The ranks read the environment variables that torchrun sets, so torchrun can start them too.
3. On several machines, each machine gets NNODES, its NODE_RANK, and the address of the first machine in MASTER_ADDR and
   MASTER_PORT.
4. SIGTERM is passed on to all ranks, where it only raises a flag. The ranks compare their flags before each update, so
   that all of them stop at the same step. Ranks that have not ended in time are killed.
5. Each rank shows how its main thread moves on (`heartbeat.py`). If one stands still, all are asked for their stacks
   and killed: the others wait for it in a sum and would do so for an hour.
6. The kernel kills the ranks if this process dies.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dmdr.config.stages import TABLE, StageName
from dmdr.errors import FINAL, INTERNAL, MOST_TELLING, ConfigError, Stopped
from stages.runtime import heartbeat, preloaded, stop_signal, watchdog
from stages.runtime.parent_death import die_with_parent

if TYPE_CHECKING:
    from dmdr.config.run import Config

GRACE = 60  # seconds; then the ranks left after a failure are killed: one that waits for a sum never sees its flag
POLL = 0.05  # seconds
FOR_STACKS = 0.5  # seconds in which a rank writes its stacks
FOR_KILL = 5.0  # seconds until a killed process has ended; one that waits for a dead disk takes longer


class Child(Protocol):
    """The process of a rank: a Popen, or a fork of this process."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...


OF_LOST_RANKS = (  # in the words of gloo, NCCL and the store of a group
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
    "failed to recv",
)


def read_rank() -> int | None:
    """The rank of this process; None if it was started alone."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether a rank fails because another one has ended: gloo and NCCL have no class of their own for that."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OF_LOST_RANKS)


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


def is_on_first_node() -> bool:
    """Whether this is the first of the machines that share the stage."""
    return os.environ.get("NODE_RANK", "0") == "0"


def join_ranks(device: str) -> None:
    """Join the process group, if this process is one of several ranks."""
    if read_rank() is not None:
        from dmdr import distributed

        distributed.join(device, int(os.environ["LOCAL_RANK"]))


@dataclass(frozen=True)
class Bounds:
    """How long ranks may take, in seconds: without progress, and to end after a signal to stop."""

    watchdog: float
    stop: float


def run_ranks(
    ranks: int, arguments: list[str], stop_signals: list[int], bounds: Bounds, *, started: Callable[[], object]
) -> int:
    """Run `python -m stages` with these arguments in `ranks` processes; returns the most telling exit code.

    stop_signals: grows with each signal that this process receives. started: called when the processes are there.
    """
    board = heartbeat.create_board(ranks)
    shared = _build_environment(ranks) | {heartbeat.VARIABLE: str(board.descriptor)}
    before = ranks * int(os.environ.get("NODE_RANK", "0"))  # ranks of the machines before this one
    children = [
        _start_rank(arguments, {**shared, "RANK": str(before + n), "LOCAL_RANK": str(n)}, board.descriptor)
        for n in range(ranks)
    ]
    started()
    team = Team(arguments[0], children, before, board)
    if team.wait(stop_signals, bounds) is not None:
        return Stopped.exit_code if stop_signals else INTERNAL
    # a killed rank that waits for a dead disk has no code yet
    code = pick_exit_code([-signal.SIGKILL if child.poll() is None else child.returncode or 0 for child in children])
    return Stopped.exit_code if code and stop_signals and code not in FINAL else code


class Team:
    """The ranks of one stage on this machine, while they run. first: the number of the first of them."""

    def __init__(self, stage: str, children: Sequence[Child], first: int, board: heartbeat.Board) -> None:
        self.stage, self.children, self.first, self.board = stage, children, first, board

    def wait(self, stop_signals: list[int], bounds: Bounds) -> watchdog.Standstill | None:
        """Wait until all have ended, and see to it that they do. Returns what the watchdog found, if it ended them."""
        dog = watchdog.Watchdog(bounds.watchdog, alone=count_nodes() == 1)
        passed_on = 0  # signals
        failed: float | None = None  # when a rank failed
        stopping: float | None = None  # when the first signal to stop came
        while running := [number for number, child in enumerate(self.children) if child.poll() is None]:
            now = time.monotonic()
            if failed is None and any(child.poll() for child in self.children):
                failed = now
                self._report_kill(stopping is not None)
                _signal(self.children, signal.SIGTERM)
            if len(stop_signals) > passed_on:
                passed_on, stopping = len(stop_signals), stopping or now
                _signal(self.children, signal.SIGTERM)
            if stopping is not None and now > stopping + bounds.stop:
                watchdog.say(self.stage, stop_signal.describe_end(bounds.stop, self._name(running)))
                _kill(self.children)
                return None
            if failed is not None and now > failed + GRACE:
                _kill(self.children)
                return None
            if (standstill := dog.look(self.board.read(), running)) is not None:
                self._end_all(standstill, bounds.watchdog)
                return standstill
            time.sleep(POLL)
        return None

    def _end_all(self, standstill: watchdog.Standstill, patience: float) -> None:
        """Show the stacks of all ranks, then kill them, and say why."""
        for number, child in enumerate(self.children):
            if child.poll() is not None:
                continue
            name = f"{self._name([number])} (process {child.pid})"
            if watchdog.read_state(child.pid) in ("T", "t"):
                watchdog.say(self.stage, f"{name} is stopped and cannot show its stacks")
                continue
            watchdog.say(self.stage, f"the stacks of {name}:")
            child.send_signal(heartbeat.SHOW_STACKS)
            time.sleep(FOR_STACKS)
        process = self.children[standstill.rank].pid
        name = self._name([standstill.rank])
        line = watchdog.describe(standstill, name=name, process=process, patience=patience)
        _kill(self.children)
        watchdog.say(self.stage, line)

    def _report_kill(self, is_stopping: bool) -> None:
        """Name the rank that a signal ended: it could not say so itself."""
        for number, child in enumerate(self.children):
            code = child.poll()
            if code is not None and code < 0 and not is_stopping:
                reason = " (out of memory, or somebody killed it)" if code == -signal.SIGKILL else ""
                watchdog.say(
                    self.stage,
                    f"{self._name([number])} was ended by signal {-code}{reason}; the others stop: repeat the command "
                    "to go on from the last checkpoint",
                )

    def _name(self, numbers: Sequence[int]) -> str:
        """Ranks by their numbers among all machines."""
        names = ", ".join(str(self.first + number) for number in numbers)
        return f"rank{'s' if len(numbers) > 1 else ''} {names}"


def _start_rank(arguments: list[str], environment: dict[str, str], board: int) -> Child:
    """A process of one rank: a fork of this one if that has the libraries already, else one that imports them.

    board: the descriptor of the heartbeats.
    """
    if preloaded.is_ready_to_fork():
        return preloaded.fork_module("stages", arguments, environment, parent_dies=signal.SIGKILL)
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *arguments],
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent(signal.SIGKILL),
        env=environment,
        pass_fds=[board],
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


def _kill(children: Sequence[Child]) -> None:
    """Kill those that still run, even stopped ones, and give the kernel time to end them."""
    _signal(children, signal.SIGKILL)
    deadline = time.monotonic() + FOR_KILL
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL)


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
