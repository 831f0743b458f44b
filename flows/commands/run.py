"""`dmdr run` and `dmdr tables`: the flows from a terminal, with Prefect's embedded server if no other is set.

The seals are read first. Prefect is imported, and its server started, only if some stage has work to do.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.run import Config
from dmdr.config.stages import STAGES
from dmdr.errors import Stopped, StoreError
from flows.prefect_support import embedded_server
from stages.reports.card import read_figures
from stages.reports.scorecard_text import format_scorecard
from stages.reports.tables.prepared import is_finished, prepare_table, write_page
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.teacher_folder import resolve_teacher

QUIET = {  # Prefect's settings; those that the user has set are kept
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the stages themselves say what they do and what went wrong
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # events that can no longer be delivered
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # "database is locked": the embedded server tries again itself
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # a busy machine
}
SERVICES = ("EventsWorker", "APILogWorker")  # Prefect's; no setting quiets their loggers, which report progress


def run_config(config: str, name: str | None, store: str) -> int:
    """Run the stages that are not sealed, then show the scorecard; returns the exit code of a failed stage, or 0.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    checked = load_config(config)
    name = name or checked.run
    if not all_sealed(checked, name, store):

        def dmdr() -> None:
            from flows.distil import dmdr

            dmdr(config, name, store)

        exit_code = start_flow(dmdr)
        if exit_code:
            return exit_code
    show_scorecard(name, store)
    return 0


def run_tables(spec: str, seeds: list[int] | None, store: str, base: str | None, out: str | None) -> int:
    """Run the stages of a table that are not sealed and write its page; returns the exit code of a failed stage, or 0.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    table = prepare_table(spec, seeds, store, base, out)
    if not is_finished(table):

        def lab_tables() -> None:
            from flows.paper_tables import lab_tables

            lab_tables(spec, seeds, store, base, out)

        return start_flow(lab_tables)
    print(f"{table.spec.table}: all {len(table.runs)} runs are sealed already in {store}")
    write_page(table)
    return 0


def all_sealed(config: Config, name: str, store: str) -> bool:
    """Whether all stages are sealed; if so, prints for each where its seal is.

    Raises:
        ConfigError: a stage is sealed under this name with other settings or inputs.
    """
    on_cluster = config.execution.cluster is not None  # then this process may have no teacher and no prompts
    if not on_cluster:
        config = resolve_teacher(config, None, lambda size: None)
    artifacts = {stage: Artifact(store, name, stage) for stage in STAGES}
    for stage, artifact in artifacts.items():
        inputs = None if on_cluster else fingerprint_inputs(config, stage, store, name)
        record = artifact.record()
        if record is None:
            return False
        artifact.claim(identity(config, stage), record.inputs if inputs is None else inputs)
    for stage, artifact in artifacts.items():
        print(f"{stage}: sealed already at {artifact.address}")
    return True


def start_flow(flow: Callable[[], None]) -> int:
    """Run a flow in this process; returns an exit code. A stage that failed has said why in its own lines.

    flow: a function that imports the flow and calls it. Prefect may only be imported after its settings are made here.

    Raises:
        StoreError: PREFECT_API_URL names a server that does not answer.
        ConfigError: it is not set, and no server is installed that could be embedded.
    """
    # Prefect raises its own exception first, then calls this handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Stopped.exit_code))
    for setting, value in QUIET.items():
        os.environ.setdefault(setting, value)
    for service in SERVICES:
        logging.getLogger(service).setLevel(logging.CRITICAL)
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from flows.launch.failure import StageFailed

    if PREFECT_API_URL.value():
        problem = get_client(sync_client=True).api_healthcheck()
        if problem:
            raise StoreError(
                f"the Prefect server at {PREFECT_API_URL.value()} does not answer ({problem}); start it, "
                "or unset PREFECT_API_URL to use the embedded one"
            )
    else:
        embedded_server.prepare_server()
        print("starting Prefect's embedded server", file=sys.stderr)
    try:
        flow()
    except StageFailed as failure:
        if failure.says_more or not failure.final:
            again = "" if failure.final else "; the same command goes on from here"
            print(f"dmdr: {failure}{again}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        return Stopped.exit_code
    return 0


def show_scorecard(name: str, store: str) -> None:
    """Print the scorecard of a run and where its report lies."""
    artifact = Artifact(store, name, "evaluate")
    with tempfile.TemporaryDirectory() as cache:
        figures = read_figures(artifact.fetch(Path(cache)), artifact.address)
    print(f"\n{format_scorecard(figures)}\n\nreport: {artifact.address}/report.html")
