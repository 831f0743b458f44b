"""`dmdr run` and `dmdr tables` from a terminal.

1. The seals are read first. Nothing is started if no stage has work to do.
2. With a Prefect server (PREFECT_API_URL, or a profile of Prefect), the run is a flow run there.
3. Without one, the stages run one after another, with the same retries. Only a cluster needs a server, which says whose
   its Jobs are: Prefect's embedded one then starts.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.plain_text import to_line
from dmdr.config.run import Config
from dmdr.config.stages import StageName, list_until
from dmdr.errors import ConfigError, Stopped
from flows import chain
from flows.commands.config_file import change_config, find_config
from flows.commands.dry_run import print_steps
from flows.launch.failure import StageFailed
from flows.launch.process import run_stage_with_retries
from flows.prefect_support import connection, embedded_server
from stages.reports.card import read_figures
from stages.reports.scorecard_text import format_scorecard
from stages.reports.tables.prepared import is_finished, prepare_table, write_page
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.runs import find_run
from stages.store.teacher_folder import resolve_teacher

QUIET = {  # Prefect's settings; those that the user has set are kept
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the stages themselves say what they do and what went wrong
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # events that can no longer be delivered
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # "database is locked": the embedded server tries again itself
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # a busy machine
}
SERVICES = ("EventsWorker", "APILogWorker")  # Prefect's; no setting quiets their loggers, which report progress


@dataclass(frozen=True)
class RunOptions:
    """The options of `dmdr run`.

    name: of the run; None: the config's. changes: "key=value" texts that change the config.
    until: the last stage; None: all. cold_start_of: a run whose prompts and cold start are copied.
    dry_run: only say what would happen.
    """

    name: str | None = None
    store: str = "runs"
    changes: tuple[str, ...] = ()
    until: StageName | None = None
    cold_start_of: str | None = None
    dry_run: bool = False


def run_config(config: str, options: RunOptions) -> int:
    """Run the stages that are not sealed, then show the scorecard; returns the exit code of a failed stage, or 0.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    with change_config(find_config(config), options.changes) as path:
        checked = load_config(path)
        name, store = options.name or checked.run, options.store
        checked.require_stage(options.until, "--until")
        if options.cold_start_of is not None:
            checked.require_stage("cold_start", "--from-cold-start")
            check_cold_start(options.cold_start_of, name, store)
        if options.dry_run:
            return print_steps(checked, name, store, options.until, options.cold_start_of)
        exit_code = 0
        if not all_sealed(checked, name, store, options.until):
            exit_code = run_stages(path, checked, name, options)
    if exit_code:
        return exit_code
    if "evaluate" in list_until(options.until):
        show_scorecard(name, store)
    else:
        print(f"stopped after {options.until}; the same command without --until goes on")
    return 0


def run_stages(path: str, checked: Config, name: str, options: RunOptions) -> int:
    """Run the stages of a run; returns an exit code. path: of the config file."""
    store, until, cold_start_of = options.store, options.until, options.cold_start_of

    def flow() -> None:
        from flows.distil import dmdr

        dmdr(path, name, store, cold_start_of=cold_start_of or "", until=list_until(until)[-1])

    return run_chain(
        lambda: chain.distil(run_stage_with_retries, path, name, store, cold_start_of=cold_start_of, until=until),
        flow,
        on_cluster=checked.execution.cluster is not None,
    )


def check_cold_start(of: str, name: str, store: str) -> None:
    """Check that another run has the cold start that this one is to begin with.

    Raises:
        ConfigError: it is this run.
        InputMissing: there is no such run, or its cold start is not sealed.
    """
    if of == name:
        raise ConfigError(f"--from-cold-start names {of}, which is this run itself; give it another name with --run")
    Artifact(store, find_run(store, of), "cold_start").sealed()


def run_tables(spec: str, seeds: list[int] | None, store: str, base: str | None, out: str | None) -> int:
    """Run the stages of a table that are not sealed and write its page; returns the exit code of a failed stage, or 0.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    table = prepare_table(spec, seeds, store, base, out)
    if not is_finished(table):

        def flow() -> None:
            from flows.paper_tables import lab_tables

            lab_tables(spec, seeds, store, base, out)

        say = partial(print, file=sys.stderr, flush=True)
        return run_chain(
            lambda: chain.run_table(run_stage_with_retries, table, say=say, publish=lambda claims: None),
            flow,
            on_cluster=any(run.config.execution.cluster is not None for run in table.runs),
        )
    print(f"{table.spec.table}: all {len(table.runs)} runs are sealed already in {store}")
    write_page(table)
    return 0


def all_sealed(config: Config, name: str, store: str, until: StageName | None = None) -> bool:
    """Whether all stages, up to `until`, are sealed; if so, prints for each where its seal is.

    Raises:
        ConfigError: a stage is sealed under this name with other settings or inputs.
    """
    on_cluster = config.execution.cluster is not None  # then this process may have no teacher and no prompts
    if not on_cluster:
        config = resolve_teacher(config, None, lambda size: None)
    artifacts = {stage: Artifact(store, name, stage) for stage in list_until(until, config.stages)}
    for stage, artifact in artifacts.items():
        inputs = None if on_cluster else fingerprint_inputs(config, stage, store, name)
        record = artifact.record()
        if record is None:
            return False
        artifact.claim(identity(config, stage), record.inputs if inputs is None else inputs)
    for stage, artifact in artifacts.items():
        print(f"{stage}: sealed already at {artifact.address}")
    return True


def run_chain(stages: Callable[[], None], flow: Callable[[], None], *, on_cluster: bool) -> int:
    """Run stages from this process; returns an exit code. A stage that failed has said why in its own lines.

    Args:
        stages: runs them without Prefect.
        flow: imports the flow that runs the same stages, and calls it. Prefect may only be imported after its settings
            are made here.
        on_cluster: the stages are Jobs of a cluster.

    Raises:
        StoreError: Prefect's server does not answer, or fails.
        ConfigError: PREFECT_API_URL is wrong, or a cluster needs a server, and none is installed that could be
            embedded.
    """
    # An exception that is raised while a stage runs stops the stage first. Prefect raises its own, then calls this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Stopped.exit_code))
    try:
        if prepare_prefect(on_cluster=on_cluster):
            with connection.translate_errors(connection.find_server()):
                flow()
        else:
            stages()
    except StageFailed as failure:
        if failure.says_more or not failure.final:
            again = "" if failure.final else "; the same command goes on from here"
            print(f"dmdr: {to_line(failure)}{again}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        return Stopped.exit_code
    return 0


def prepare_prefect(*, on_cluster: bool) -> bool:
    """Make Prefect ready if a server is set, or needed; returns whether it is. Raises as `run_chain`."""
    for setting, value in QUIET.items():
        os.environ.setdefault(setting, value)
    for service in SERVICES:
        logging.getLogger(service).setLevel(logging.CRITICAL)
    if (address := connection.find_server()) is not None:
        connection.check_server(address)
        return True
    if on_cluster:
        embedded_server.prepare_server()
        print("starting Prefect's embedded server", file=sys.stderr)
    return on_cluster


def show_scorecard(name: str, store: str) -> None:
    """Print the scorecard of a run and where its report lies."""
    artifact = Artifact(store, name, "evaluate")
    with tempfile.TemporaryDirectory() as cache:
        figures = read_figures(artifact.fetch(Path(cache)), artifact.address)
    print(f"\n{format_scorecard(figures)}\n\nreport: {artifact.address}/report.html")
