"""`dmdr compare`: runs side by side, as a page and as tables on the terminal. No Prefect."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dmdr.errors import ConfigError
from stages.reports.scorecard_text import as_text
from stages.store.runs import follow_name


def compare(names: list[str], store: str, out: str) -> int:
    """Write the page and print what it says in short; names: of runs, or what they were promoted as. Always 0.

    Raises:
        ConfigError: fewer than two runs, or one of them twice.
        InputMissing: a run has no sealed evaluation.
        DataError: a file is damaged, or a scorecard is of another DMDR.
    """
    runs = [follow_name(store, name) for name in names]
    if len(runs) < 2:
        raise ConfigError(f"compare has only {runs[0]} to compare; name two runs or more, as dmdr runs lists them")
    twice = [run for run in dict.fromkeys(runs) if runs.count(run) > 1]
    if twice:
        raise ConfigError(f"compare is given {', '.join(twice)} more than once; name each run once")
    from stages.reports.comparison.merged import (
        remarks,  # with numpy, scipy and torch, of which the other commands need none
    )
    from stages.reports.comparison.page import write
    from stages.reports.comparison.results import read

    with tempfile.TemporaryDirectory() as cache:
        found = read(runs, store, Path(cache))
        card = write(found, Path(out))
    print("\n\n".join([as_text(card), *remarks(found), f"page: {out}"]))
    return 0
