"""What the watch noticed of collapses made on purpose, and what recovery saved: a table in Markdown.

    dmdr tables configs/tables/collapses.yaml
    python -m docs.scripts.collapses [--spec configs/tables/collapses.yaml] [--store runs]

A row is a run and a training stage that is watched: what rang first and when, what the recoveries did, and what the
student is worth in the end. Runs that are not finished are left out.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from dmdr.config.stages import TRAINING_STAGES
from dmdr.errors import USER_ERRORS
from stages.reports.card import read_figures
from stages.reports.provenance import WatchFacts, describe_recovery
from stages.reports.scorecard_text import format_table
from stages.reports.tables.plan import Run, plan_runs
from stages.reports.tables.spec import Spec, load_spec
from stages.store.artifacts import Artifact


def read_watch(store: str, run: str, stage: str) -> WatchFacts | None:
    """What the watch of a sealed stage saw; None where there was none."""
    record = Artifact(store, run, stage).record()
    return WatchFacts.model_validate(record.facts["watch"]) if record is not None and "watch" in record.facts else None


def describe_first(facts: WatchFacts) -> str:
    """The figures of the first look at which something rang."""
    rung = {(alarm.update, alarm.figure) for alarm in facts.alarms}
    rung |= {(recovery.update, figure) for recovery in facts.recoveries for figure in recovery.figures}
    # what rings after a recovery is of another course
    first = facts.recoveries[0].update if facts.recoveries else min((update for update, _ in rung), default=0)
    figures = sorted(figure.removeprefix("watch/") for update, figure in rung if update == first)
    return f"{', '.join(figures)} at {first}" if figures else "nothing"


def describe_recoveries(facts: WatchFacts) -> str:
    """What each did; equal ones that follow each other are counted."""
    told = [(text, len(list(same))) for text, same in groupby(map(describe_recovery, facts.recoveries))]
    return "; ".join(f"{count} times {text}" if count > 1 else text for text, count in told) or "none"


def read_scores(spec: Spec, store: str, run: str) -> list[str]:
    """The student's means of the table's columns."""
    evaluation = Artifact(store, run, "evaluate")
    with tempfile.TemporaryDirectory() as folder:
        card = read_figures(evaluation.fetch(Path(folder), "scorecard.json".__eq__), evaluation.address)
    means = {row.name: row.mean for row in card.metrics}
    return ["" if means[column.metric] is None else f"{means[column.metric]:.3f}" for column in spec.columns]


def list_rows(spec: Spec, store: str, runs: list[Run]) -> Iterator[list[str]]:
    """A row for each watched stage of each finished run."""
    for run in runs:
        if Artifact(store, run.name, "evaluate").record() is None:
            continue
        scores = read_scores(spec, store, run.name)
        for stage in TRAINING_STAGES:
            facts = read_watch(store, run.name, stage)
            if facts is not None:
                yield [run.row.label, str(run.seed), stage, describe_first(facts), describe_recoveries(facts), *scores]


def main(
    spec: Annotated[str, typer.Option(help="the table")] = "configs/tables/collapses.yaml",
    store: Annotated[str, typer.Option(help="where the runs lie")] = "runs",
) -> None:
    """Print the table."""
    table = load_spec(spec)
    with tempfile.TemporaryDirectory() as folder:
        runs = plan_runs(table, Path(folder))
    head = ["run", "seed", "stage", "rang first", "recoveries", *(column.metric for column in table.columns)]
    print(format_table([head, *list_rows(table, store, runs)]))


if __name__ == "__main__":
    try:
        typer.run(main)
    except USER_ERRORS as error:
        sys.exit(f"collapses: {error}")
