"""`dmdr run` and `dmdr tables`: the flows from a terminal, with Prefect's embedded server, as little of it as can be.

The seals are looked at first. Prefect is imported, and its server started, only if some stage has work to do.
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
from dmdr.errors import StoreError
from flows.prefect_support import embedded_server
from stages.reports.card import read_figures
from stages.reports.scorecard_text import format_scorecard
from stages.reports.tables.prepared import is_finished, prepare_table, write_page
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.teacher_folder import resolve_teacher

STOPPED = 75
QUIET = {  # Prefect's settings; what the user has set wins
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the stages say themselves what they do and what went wrong
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # events that could not be delivered any more
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # "database is locked", which the embedded server itself retries
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # a busy machine
}
SERVICES = ("EventsWorker", "APILogWorker")  # Prefect's, whose loggers no setting reaches: they tell how far they are


def run_config(config: str, name: str | None, store: str) -> int:
    """Run what is not sealed yet, then show the scorecard; returns the exit code of the stage that failed, or 0.

    Raises:
        ConfigError, DataError, InputMissing: before anything has started.
    """
    checked = load_config(config)
    name = name or checked.run
    if not all_sealed(checked, name, store):

        def dmdr() -> None:
            from flows.distil import dmdr

            dmdr(config, name, store)

        code = start_flow(dmdr)
        if code:
            return code
    show_scorecard(name, store)
    return 0


def run_tables(spec: str, seeds: list[int] | None, store: str, base: str | None, out: str | None) -> int:
    """Run what is not sealed yet of a table and write its page; returns the exit code of a stage that failed, or 0.

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
    """Whether nothing is left to do; if so, one line a stage says where its seal is.

    Raises:
        ConfigError: a stage is sealed under this name with other settings or inputs.
    """
    sealed = []
    on_cluster = config.execution.cluster is not None  # where this process may have no teacher and no prompts
    config = config if on_cluster else resolve_teacher(config, None, lambda here: None)
    for stage in STAGES:
        artifact = Artifact(store, name, stage)
        needed = {} if on_cluster else fingerprint_inputs(config, stage, store, name)
        if (record := artifact.record()) is None:
            return False
        artifact.claim(identity(config, stage), record.inputs if on_cluster else needed)
        sealed.append(artifact.address)
    for stage, address in zip(STAGES, sealed, strict=True):
        print(f"{stage}: sealed already at {address}")
    return True


def start_flow(flow: Callable[[], None]) -> int:
    """A flow, in this process; returns an exit code. A stage that failed has said why in its own lines.

    flow: imports and calls it; nothing of Prefect may be imported before this function has set it up.

    Raises:
        StoreError: PREFECT_API_URL names a server that does not answer.
        ConfigError: it is not set, and there is no server to embed.
    """
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(STOPPED)
    )  # Prefect raises its own exception first, then calls this
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
        return failure.code
    except KeyboardInterrupt:
        return STOPPED
    return 0


def show_scorecard(name: str, store: str) -> None:
    """Print the scorecard of a run and where its report lies."""
    artifact = Artifact(store, name, "evaluate")
    with tempfile.TemporaryDirectory() as cache:
        figures = read_figures(artifact.fetch(Path(cache)), artifact.address)
    print(f"\n{format_scorecard(figures)}\n\nreport: {artifact.address}/report.html")
