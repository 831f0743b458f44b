"""The flow `lab-tables`: every run of a table of the paper, then one page that says which claims hold."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.runtime import deployment

from flows.chain import run_table
from flows.distil import run_stage
from flows.launch import given_config
from flows.launch.failure import explain_faults
from flows.prefect_support import artifacts
from stages.reports.tables.prepared import prepare_table


@flow(name="lab-tables", persist_result=False, result_serializer="json")
def lab_tables(
    spec: str, seeds: list[int] | None = None, store: str = "runs", base: str | None = None, out: str | None = None
) -> None:
    """Run a table of the paper and write its page. The same command continues.

    Args:
        spec: path of the table's YAML file
        seeds: replace the table's own
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        base: a config that replaces the table's own
        out: path of the page; tables/NAME.html if not given

    Raises:
        StageFailed: a stage ended without its seal.
    """
    say = get_run_logger().info if deployment.id else partial(print, file=sys.stderr, flush=True)
    with explain_faults("flow lab-tables"):
        given_config.wait_for_file(Path(spec), say, seconds=given_config.WAIT if deployment.id else 0.0)
        table = prepare_table(spec, seeds, store, base, out)
        run_table(run_stage, table, say=say, publish=partial(artifacts.publish_page, table.spec.runs))
