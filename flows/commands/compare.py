"""`dmdr compare`: runs side by side, as a page and as tables on the terminal."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dmdr.errors import ConfigError
from stages.reports.scorecard_text import format_scorecard
from stages.store.runs import follow_name


def compare_runs(names: list[str], store: str, out: str) -> int:
    """Write the page and print its tables; returns 0. names: of runs, or names that they were promoted to.

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
        raise ConfigError(f"compare got {', '.join(twice)} more than once; name each run once")
    from stages.reports.comparison.page import write_page
    from stages.reports.comparison.remarks import list_remarks
    from stages.reports.comparison.results import read_runs

    with tempfile.TemporaryDirectory() as cache:
        results = read_runs(runs, store, Path(cache))
        card = write_page(results, Path(out))
    print("\n\n".join([format_scorecard(card), *list_remarks(results), f"page: {out}"]))
    return 0
