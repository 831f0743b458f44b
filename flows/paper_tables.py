"""The flow `lab-tables`: every run of a table of the paper, then one page that says which claims hold.

1. Rows share stages. Before a stage runs, it is looked for in the other rows of the same seed: a stage that was made
   there from the same settings and inputs is the same artifact and is copied.
2. The runs go seed by seed, and the page is written after each seed. So it has all rows early.
3. A row whose training fails (a loss that is not a number, or a fault of ours) does not stop the others: the page says
   that it is not finished, and the flow ends with its failure. Any other failure stops the flow. The same command
   continues.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from prefect import flow, get_run_logger
from prefect.runtime import deployment

from dmdr.config.identity import identity
from dmdr.errors import INTERNAL
from flows.distil import StageFailed, run_stage
from flows.prefect_support import artifacts
from stages.reports.tables.plan import Run
from stages.reports.tables.prepared import prepare_table, write_page
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs


@flow(name="lab-tables", persist_result=False, result_serializer="json")
def lab_tables(
    spec: str, seeds: list[int] | None = None, store: str = "runs", base: str | None = None, out: str | None = None
) -> None:
    """Run a table of the paper and write its page.

    Args:
        spec: path of the table's YAML file
        seeds: replace the table's own
        store: where artifacts lie, a folder or any fsspec URL such as s3://bucket/prefix
        base: a config that replaces the table's own
        out: path of the page; tables/NAME.html if not given

    Raises:
        StageFailed: a stage ended without its seal.
    """
    table = prepare_table(spec, seeds, store, base, out)
    say = get_run_logger().info if deployment.id else _to_terminal
    failures: list[StageFailed] = []
    for number, run in enumerate(table.runs, start=1):
        say(f"{table.spec.table}: run {number} of {len(table.runs)}, {run.name}")
        try:
            complete_run(run, [each for each in table.runs if each.seed == run.seed], store, say)
        except StageFailed as failure:
            if failure.exit_code != INTERNAL:
                raise
            say(f"{run.name} cannot be finished: {failure}; the others go on")
            failures.append(failure)
        if run is table.runs[-1] or table.runs[number].seed != run.seed:
            artifacts.publish_page(table.spec.runs, write_page(table))
    if failures:
        raise failures[0]


def complete_run(run: Run, siblings: list[Run], store: str, say: Callable[[str], None]) -> None:
    """Seal every stage of a run: it is sealed already, a sibling's result is copied, or it runs."""
    for name in run.row.stages:
        own = Artifact(store, run.name, name)
        settings, inputs = identity(run.config, name), fingerprint_inputs(run.config, name, store, run.name)
        if own.record() is not None:
            own.claim(settings, inputs)
            continue
        others = (Artifact(store, sibling.name, name) for sibling in siblings if sibling is not run)
        copies = (own.adopt(other, settings, inputs) for other in others)
        adopted = next((record for record in copies if record is not None), None)
        if adopted is not None:
            say(f"{name}: the same as that of {adopted.provenance.adopted_from}, copied to {own.address}")
        else:
            run_stage(name, str(run.path), run.name, store)


def _to_terminal(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
