"""What the flows chain, in data order, without Prefect: a run's stages, an evaluation, the runs of a table.

`flows.distil` and `flows.paper_tables` make Prefect flows of it. `dmdr run` calls it directly where there is no server.

1. Truth is in the store: a stage is done when it exited with 0 and its seal is there.
2. To continue, run the chain again: a sealed stage says so and stops, an open one resumes.
3. Rows of a table share stages. Before a stage runs, it is looked for in the other rows of the same seed: a stage that
   was made there from the same settings and inputs is the same artifact and is copied.
4. The runs of a table go seed by seed, and the page is written after each seed. So it has all rows early.
5. A row whose training fails (a loss that is not a number, or a fault of ours) does not stop the others: the page says
   that it is not finished, and the chain ends with its failure. Any other failure stops it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.stages import StageName, list_needed, list_until
from dmdr.errors import INTERNAL, Stopped
from flows.launch.failure import StageFailed
from stages.reports.tables.plan import Run
from stages.reports.tables.prepared import Table, write_page
from stages.runtime.events import announce_failure
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs


class RunStage(Protocol):
    """Runs one stage to its seal. teacher, adopt: as the options of `python -m stages`.

    Raises:
        StageFailed: it exited with another code than 0, or its seal is missing.
    """

    def __call__(
        self, name: StageName, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
    ) -> None: ...


def distil(
    run_stage: RunStage,
    config: str,
    run: str,
    store: str,
    teacher: str | None = None,
    cold_start_of: str | None = None,
    until: StageName | None = None,
) -> None:
    """Distil the teacher of a config file into its student, and score it. The arguments are those of the flow `dmdr`.

    Raises:
        StageFailed: a stage ended without its seal.
    """
    run_stage = run_only(list_until(until, load_config(config).stages), tell_of_failure(run_stage))
    run_stage("prompts", config, run, store, teacher, adopt=cold_start_of)
    run_stage("cold_start", config, run, store, teacher, adopt=cold_start_of)
    run_stage("joint", config, run, store, teacher)
    run_stage("export", config, run, store, teacher)
    run_stage("evaluate", config, run, store, teacher)


def run_only(wanted: tuple[StageName, ...], run_stage: RunStage) -> RunStage:
    """`run_stage` that does nothing for other stages: those after `until`, or a cold start that the config lacks."""

    def run_wanted(
        name: StageName, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
    ) -> None:
        if name in wanted:
            run_stage(name, config, run, store, teacher, adopt=adopt)

    return run_wanted


def tell_of_failure(run_stage: RunStage) -> RunStage:
    """`run_stage` that tells the receivers of `execution.notify` of a failure that no other try follows."""

    def run_and_tell(
        name: StageName, config: str, run: str, store: str, teacher: str | None = None, adopt: str | None = None
    ) -> None:
        try:
            run_stage(name, config, run, store, teacher, adopt=adopt)
        except StageFailed as failure:
            if failure.exit_code != Stopped.exit_code:
                artifact = Artifact(store, run, name)
                say = partial(print, file=sys.stderr, flush=True)
                announce_failure(load_config(config), artifact, failure.exit_code, str(failure), say)
            raise

    return run_and_tell


def evaluate_with_pipelines(run_stage: RunStage, config: str, run: str, source_run: str, store: str) -> None:
    """Evaluate what `source_run` has sealed together with the pipelines of the config, as the run `run`.

    Raises:
        StageFailed: a stage ended without its seal.
    """
    checked, run_stage = load_config(config), tell_of_failure(run_stage)
    for name in list_needed("evaluate", checked.evaluate.models, checked.stages):
        is_sealed = Artifact(store, source_run, name).record() is not None
        run_stage(name, config, run, store, adopt=source_run if is_sealed else None)
    run_stage("evaluate", config, run, store)


def run_table(run_stage: RunStage, table: Table, *, say: Callable[[str], None], publish: Callable[[str], None]) -> None:
    """Run what is not sealed of a table, and write its page.

    publish: takes the table's verdict on the paper's claims, each time that the page is written.

    Raises:
        StageFailed: a stage ended without its seal.
    """
    failures: list[StageFailed] = []
    for number, run in enumerate(table.runs, start=1):
        say(f"{table.spec.table}: run {number} of {len(table.runs)}, {run.name}")
        try:
            complete_run(run_stage, run, [each for each in table.runs if each.seed == run.seed], table.store, say)
        except StageFailed as failure:
            if failure.exit_code != INTERNAL:
                raise
            say(f"{run.name} cannot be finished: {failure}; the others go on")
            failures.append(failure)
        if run is table.runs[-1] or table.runs[number].seed != run.seed:
            publish(write_page(table))
    if failures:
        raise failures[0]


def complete_run(run_stage: RunStage, run: Run, siblings: list[Run], store: str, say: Callable[[str], None]) -> None:
    """Seal every stage of a run: it is sealed already, a sibling's result is copied, or it runs."""
    run_stage = tell_of_failure(run_stage)
    for name in run.stages:
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
