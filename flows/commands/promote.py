"""`dmdr promote`: names for results, given freely or only to a better run, their history, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from dmdr.config.names import describe_rule, is_name
from dmdr.errors import ConfigError, NotPromoted
from flows.commands.config_file import find_config
from stages.store.address import shorten
from stages.store.records import Pointer
from stages.store.runs import list_history, promote_run, undo_promotion


@dataclass(frozen=True)
class PromoteOptions:
    """The options of `dmdr promote`. config: path of the run's config, for `if_better`."""

    store: str = "runs"
    if_better: str | None = None
    undo: bool = False
    config: str | None = None


def promote_result(run: str | None, name: str, options: PromoteOptions) -> int:
    """Give a name to the export of a run, so that `dmdr pull` finds it by that name; returns 0.

    run: None with --undo, which goes back, or without, which prints the history of the name.

    Raises:
        ConfigError: options that do not go together, or as below.
        NotPromoted: the run is no better than the one that has the name.
        ConfigError, InputMissing, DataError: as `promote_run`, `undo_promotion` and `promote_if_better`.
    """
    check_options(run, options)
    if options.undo:
        pointer = undo_promotion(options.store, name)
        print(f"{name} is the export of {pointer.run} again, fingerprint {shorten(pointer.fingerprint)}")
    elif run is None:
        print_history(name, options.store)
    elif options.if_better is not None:
        return promote_if_better(run, name, options.if_better, options)
    else:
        pointer = promote_run(options.store, run, name)
        before = "" if pointer.before is None else f", before {pointer.before.run}"
        print(f"{name} is the export of {run} now, fingerprint {shorten(pointer.fingerprint)}{before}")
    return 0


def check_options(run: str | None, options: PromoteOptions) -> None:
    """Raises ConfigError for options that do not go together."""
    if options.undo and (run is not None or options.if_better is not None):
        raise ConfigError("--undo goes back to the run that had the name before; give neither RUN nor --if-better")
    if run is None and options.if_better is not None:
        raise ConfigError("--if-better judges a run; name it: dmdr promote RUN --as NAME --if-better METRIC")
    if options.config is not None and options.if_better is None:
        raise ConfigError("--config is read with --if-better only; give both, or neither")


def promote_if_better(run: str, name: str, if_better: str, options: PromoteOptions) -> int:
    """Judge the run and print the decision; returns 0, or the exit code of an evaluation that failed.

    Raises:
        as `promote_result`.
    """
    from flows.launch.failure import StageFailed
    from flows.launch.process import run_stage_with_retries
    from flows.promotion import Rule, promote

    if not is_name(name):
        raise ConfigError(f"name {name!r} {describe_rule(name)}")
    try:
        rule = Rule(name=name, if_better=if_better)
    except ValidationError as error:
        raise ConfigError("--if-better names no metric; give some of the scorecard's, with commas") from error
    config = None if options.config is None else find_config(options.config)
    try:
        decision = promote(run_stage_with_retries, rule, run, options.store, config)
    except StageFailed as failure:  # whose lines stand on the terminal
        return failure.exit_code
    if not decision.is_promoted:
        raise NotPromoted(decision.text)
    print(decision.text)
    return 0


def print_history(name: str, store: str) -> None:
    """Print what a name has pointed at, a line for each move.

    Raises:
        InputMissing: nobody gave the name.
    """
    for pointer in list_history(store, name):
        print(f"{pointer.promoted_at}  {pointer.run}, fingerprint {shorten(pointer.fingerprint)}{_describe(pointer)}")


def _describe(pointer: Pointer) -> str:
    if pointer.undoes is not None:
        return f", back from {pointer.undoes}"
    return "" if pointer.before is None else f", before {pointer.before.run}"
