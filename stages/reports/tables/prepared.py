"""Prepares a table: reads and checks it, says whether any of its runs is left to do, and writes its page."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dmdr.config.identity import identity
from stages.reports.tables.plan import Run, plan_runs
from stages.reports.tables.spec import Spec, load_spec
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs


@dataclass(frozen=True)
class Table:
    """A table that is ready to run. out: its page; command: the shell command that makes it again."""

    spec: Spec
    runs: list[Run]
    store: str
    out: Path
    command: str


def prepare_table(spec: str, seeds: list[int] | None, store: str, base: str | None, out: str | None) -> Table:
    """Read and check everything, and write the configs of all runs beside the page.

    Raises:
        ConfigError, InputMissing: the table, its base or a row cannot be run.
    """
    loaded = load_spec(spec)
    stems = [Path(path).stem for path in (spec, base) if path]
    page = Path(out) if out else Path("tables") / f"{'-'.join(stems)}.html"
    runs = plan_runs(loaded, page.with_suffix(""), seeds=seeds, base=base)
    words = ["dmdr", "tables", spec, *(["--seeds", *map(str, seeds)] if seeds else [])]
    words += ["--store", store] if store != "runs" else []
    words += ["--base", base] if base else []
    words += ["--out", out] if out else []
    return Table(loaded, runs, store, page, shlex.join(words))


def is_finished(table: Table) -> bool:
    """Whether every stage of every run is sealed.

    Raises:
        ConfigError: a stage is sealed under a run's name with other settings or inputs.
    """
    for each in table.runs:
        for stage in each.stages:
            artifact = Artifact(table.store, each.name, stage)
            if artifact.record() is None:
                return False
            artifact.claim(identity(each.config, stage), fingerprint_inputs(each.config, stage, table.store, each.name))
    return True


def write_page(table: Table) -> str:
    """Write the page from what is sealed so far. Prints the judged claims and the page's path, and returns them."""
    # These need numpy and scipy, which a process that only starts runs does not.
    from stages.reports.tables.claims import format_judgement
    from stages.reports.tables.page import write_table_page

    judgements = write_table_page(table.spec, table.runs, table.store, table.out, table.command)
    lines: list[str] = []
    for judgement in judgements:
        claim = f"\n{judgement.claim.claim}\n"
        if claim not in lines:
            lines.append(claim)
        lines.append(f"- {format_judgement(judgement)}")
    lines.append(f"\npage: {table.out}")
    print("\n".join(lines), flush=True)
    return "\n".join(lines)
