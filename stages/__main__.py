"""python -m stages STAGE --config FILE [--run NAME] [--store URL] [--teacher ADDRESS] [--adopt RUN]

Is the stage sealed already? Say so and stop. Does another live copy of it run? Stand by. Otherwise run it, then seal
it. Resuming is the same command again.
dmdr/errors.py lists the exit codes. With `execution.processes` above 1 a stage becomes as many processes; see ranks.py.
Only what the help shows is imported at once. `prepare` imports the rest, in the order in which it is needed.
"""

from __future__ import annotations

from stages.runtime import stop_signal

if __name__ == "__main__":
    stop_signal.install()  # before the imports below, which take time

import importlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dmdr.config.secrets import refuse_secret_arguments
from dmdr.config.stages import STAGES, TABLE
from dmdr.errors import (
    FINAL,
    INTERNAL,
    SEALED,
    USER_ERRORS,
    ConfigError,
    NonFinite,
    Stopped,
    StoreError,
    exit_code_of,
)
from stages.runtime import ranks
from stages.runtime.command_line import PROGRAM, Options, parse
from stages.runtime.context import Context
from stages.runtime.last_wall import end_program
from stages.runtime.quiet import quiet_libraries
from stages.runtime.terminal import plain_streams

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from stages.store.artifacts import Artifact
    from stages.store.records import Record

Run = Callable[[Context], dict[str, object]]


@dataclass(frozen=True)
class Work:
    """A stage that is ready to run. began: by the monotonic clock."""

    run: Run
    context: Context
    began: float


def main(arguments: list[str]) -> int:
    """Run one stage and return the exit code. Whatever goes wrong is one line on stderr."""
    with plain_streams(), ExitStack() as ends:
        stage = PROGRAM
        work: Work | int | None = None
        options: Options | int = SEALED
        try:
            refuse_secret_arguments(arguments)
            options = parse(arguments)
            if not isinstance(options, Options):
                return options
            stage = options.stage
            work = prepare(options, ends)
            if not isinstance(work, Work):
                tell_of_end(options, work, "see the lines of its ranks")
                return work
            facts = work.run(work.context)
            seal(work, facts)
            return SEALED
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(work, Work) and is_sealed_meanwhile(work.context.artifact):
                return SEALED
            code = report_error(stage, error)
            tell_of_end(options, code, error)
            # whoever told it to stop asks for no reason; the last checkpoint is whole
            return Stopped.exit_code if code == StoreError.exit_code and stop_signal.is_set() else code


def prepare(options: Options, ends: ExitStack) -> Work | int:
    """Claim the stage's address and build its context; the exit code where no work is left for this process.

    ends: gets what has to end with the process.

    Raises:
        any of USER_ERRORS.
    """
    began, stage = time.monotonic(), options.stage
    from dmdr.config.load import load_config
    from stages.runtime.guard import Guard
    from stages.store.artifacts import Artifact
    from stages.store.lease import find_lease
    from stages.store.teacher_folder import resolve_teacher

    guard = Guard(stage)
    ends.callback(guard.end)
    config = load_config(options.config)
    guard.watch(config)
    config.require_stage(stage, stage)
    config = resolve_teacher(config, options.teacher, lambda size: stop_if_asked())
    run = config.run if options.run is None else options.run
    artifact = Artifact(options.store, run, stage)
    processes, is_first = ranks.count_processes(config, stage), not ranks.read_rank()
    if is_first and claim(options, config, artifact):
        return SEALED
    lease = find_lease(artifact, stop_if_asked, takes=is_first and ranks.is_on_first_node())
    if lease is None:
        report_sealed(artifact)
        return SEALED
    ends.callback(lease.release)
    stop_if_asked()
    if processes:
        guard.end()  # a process with threads cannot be forked
        teacher = config.teacher.path if options.teacher is not None else None
        bounds = ranks.Bounds(config.execution.watchdog, stop_signal.count_seconds(config, stage))
        arguments = options.to_arguments(run, teacher)
        code = ranks.run_ranks(processes, arguments, stop_signal.received, bounds, started=lease.start_signs)
        return end_ranks(code, artifact)
    lease.start_signs()

    quiet_libraries()
    run_stage: Run = importlib.import_module(f"stages.{stage}").run  # imports torch
    from stages.runtime.device import pick_device
    from stages.runtime.ledger import Ledger
    from stages.runtime.progress import Progress

    guard.heed_waits()
    stop_if_asked()
    ranks.join_ranks(pick_device(config))
    workspace = artifact.workspace()
    (out := workspace / "out").mkdir()
    context = Context(
        config=config,
        artifact=artifact,
        out=out,
        cache=workspace / "inputs",
        progress=Progress(
            stage, shown=is_first, place=f"stage {config.stages.index(stage) + 1} of {len(config.stages)}"
        ),
        stop=stop_signal.is_set,
        ledger=Ledger(began),
    )
    return Work(run_stage, context, began)


def claim(options: Options, config: Config, artifact: Artifact) -> bool:
    """Claim the stage's address, and check what can be known before the stage runs. Returns whether it is sealed."""
    from dmdr.config.identity import identity
    from dmdr.rewards.sources import list_sources
    from stages.runtime.prerequisites import check_evaluation, check_worlds, read_evaluation_prompts
    from stages.store.adoption import adopt_stage
    from stages.store.inputs import fingerprint_inputs

    stage = options.stage
    settings = identity(config, stage)
    if options.adopt is not None and artifact.record() is None:
        inputs = fingerprint_inputs(config, stage, options.store, artifact.run)
        adopt_stage(artifact, options.adopt, settings, inputs)
        print(f"{stage}: the same as that of {options.adopt}, copied to {artifact.address}")
        return True
    is_open = artifact.record() is None
    rewards = list_sources(config, say=lambda line: print(f"{stage}: {line}", flush=True), stop=stop_signal.is_set)
    inputs = fingerprint_inputs(config, stage, options.store, artifact.run, rewards=rewards if is_open else None)
    if artifact.claim(settings, inputs) is not None:
        print(f"{stage}: sealed already at {artifact.address}")
        return True
    check_worlds(config)
    if TABLE[stage].trains and ranks.read_rank() is None:  # the settings may have changed since the prompts
        check_evaluation(config, read_evaluation_prompts(config, artifact), lambda line: None)
    if ranks.read_rank() is None:
        check_budget(config, artifact)
    return False


def check_budget(config: Config, artifact: Artifact) -> None:
    """
    Raises:
        BudgetSpent: the run has cost what it may before the stage begins, or goes on.
    """
    if config.execution.budget is None:
        return
    from stages.runtime.ledger import Budget, read_spent

    budget, spent = Budget(config, artifact), read_spent(artifact)
    if budget.is_spent(spent):
        raise budget.build_error(spent, "before it began")


def end_ranks(code: int, artifact: Artifact) -> int:
    """The exit code of the process that started the ranks. code: theirs."""
    if stop_signal.is_set():
        stop_signal.start_limit(None, stop_signal.AFTER_RANKS)  # the store may hang while the lease is given back
        return code
    return SEALED if code and is_sealed_meanwhile(artifact) else code


def seal(work: Work, facts: dict[str, object]) -> None:
    """Seal the stage's result; only the first rank does."""
    if ranks.read_rank():
        return
    from stages.runtime.provenance import describe_process

    context = work.context
    seconds = time.monotonic() - work.began
    record = context.artifact.seal(
        context.out, facts=facts, provenance=describe_process(context.config, seconds, context.ledger)
    )
    print(f"{context.artifact.stage}: sealed at {context.artifact.address} after {seconds:.1f} s")
    tell_of_seal(context, record, seconds)


def tell_of_seal(context: Context, record: Record, seconds: float) -> None:
    """Tell the receivers of `execution.notify` that the stage is sealed, and the run finished if it was the last."""
    if not context.config.execution.notify:
        return
    from stages.runtime.events import announce, build_finished, build_sealed

    config, artifact, say = context.config, context.artifact, context.progress.say
    announce(config, lambda: build_sealed(artifact, record.fingerprint, seconds), say)
    if artifact.stage == STAGES[-1]:
        announce(config, lambda: build_finished(artifact, record), say)


def tell_of_end(options: Options | int, code: int, error: BaseException | str) -> None:
    """Tell the receivers of `execution.notify` that the stage ended without its seal.

    Where a flow started it and may try again, the flow tells when no try is left. Of several ranks the first tells, and
    the process that started them of what no rank could say.
    """
    if isinstance(options, int) or code in (SEALED, Stopped.exit_code):
        return
    from dmdr.config.load import load_config
    from stages.runtime.events import FLOW, announce_failure
    from stages.store.artifacts import Artifact

    if ranks.read_rank() or (FLOW in os.environ and code not in FINAL):
        return
    with suppress(*USER_ERRORS):  # of the config or the store: that is what it ended for, and is told already
        config = load_config(options.config)
        artifact = Artifact(options.store, options.run or config.run, options.stage)
        say = partial(print, file=sys.stderr, flush=True)
        announce_failure(config, artifact, code, error, say)


def stop_if_asked() -> None:
    """
    Raises:
        Stopped: a signal told this process to stop before the stage began.
    """
    if stop_signal.is_set():
        raise Stopped("told to stop before it began; repeat the command to begin")


def is_sealed_meanwhile(artifact: Artifact) -> bool:
    """Whether another copy sealed the stage while this one worked: then it may have removed what this one read."""
    try:
        if artifact.record() is None:
            return False
    except (OSError, ValueError):  # the store fails, which is what this copy met, too
        return False
    report_sealed(artifact)
    return True


def report_sealed(artifact: Artifact) -> None:
    """Say that another copy sealed the stage; only the first rank does."""
    if not ranks.read_rank():
        print(f"{artifact.stage}: sealed by another copy at {artifact.address}")


def report_error(stage: str, error: BaseException) -> int:
    """Print one line and return the exit code. What every rank meets, only the first reports."""
    from stages.store.s3_errors import Refused

    rank = ranks.read_rank()
    if rank is not None and ranks.is_of_lost_rank(error):
        print(f"{stage}, rank {rank}: lost its connection to another rank, which ended first", file=sys.stderr)
        return INTERNAL
    if rank:
        if isinstance(error, (ConfigError, NonFinite, Stopped)) and not isinstance(error, Refused):
            return exit_code_of(error)
        stage = f"{stage}, rank {rank}"
    return end_program(stage, error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
