"""List the runs of a store, and promote runs under names that other programs use.

{store}/{run}/...                  see artifacts.py
       /_promoted/{name}/          the moves of a name, see pointers.py; the last one points at the export of a run

A move holds the fingerprint of the result. So if a run is deleted and made again under its old name, it must be
promoted again before the promoted name means the new result.
"""

from __future__ import annotations

import difflib
import re
from typing import Literal

from dmdr.config.names import NAME, describe_rule, is_name
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError, DataError, InputMissing
from stages.store.address import open_place, shorten
from stages.store.artifacts import Artifact
from stages.store.pointers import (
    BEGINNING,
    PROMOTED,
    SCHEMA,
    append_move,
    list_moves,
    list_pointers,
    read_move,
    read_newest,
)
from stages.store.records import Pointer, Record

STAGE: Literal["export"] = "export"


def list_runs(store: str) -> list[str]:
    """The names of all runs, including those that have sealed nothing yet."""
    return [name for name in open_place(store).folders() if re.fullmatch(NAME, name) and is_run(store, name)]


def is_run(store: str, name: str) -> bool:
    """Whether the store has a folder of that name with a stage in it."""
    return not set(STAGES).isdisjoint(open_place(f"{store.rstrip('/')}/{name}").folders())


def list_promoted(store: str) -> dict[str, Pointer]:
    """Every promoted name and what it points at."""
    return list_pointers(store)


def list_history(store: str, name: str) -> list[Pointer]:
    """What a name has pointed at, the first move first.

    Raises:
        InputMissing: nobody gave the name.
    """
    if not re.fullmatch(NAME, name) or not (moves := list_moves(store, name)):
        raise _say_not_given(store, name)
    return [moves[number] for number in sorted(moves)]


def promote_run(store: str, run: str, name: str) -> Pointer:
    """Make `name` point at the sealed export of `run`; returns the pointer, which includes the one before.

    A name that points at this result already is left as it is.

    Raises:
        ConfigError: the name cannot stand in an address, or is the name of a run.
        InputMissing: the export is not sealed.
    """
    record = check_promotion(store, run, name)
    while True:
        number, carrier = read_newest(store, name)
        if carrier is not None and (carrier.run, carrier.fingerprint) == (run, record.fingerprint):
            return carrier
        made = move_name(store, run, name, record.fingerprint, after=(number, carrier))
        if made is not None:
            return made


def check_promotion(store: str, run: str, name: str) -> Record:
    """The sealed export of a run that may have this name.

    Raises:
        ConfigError, InputMissing: as `promote_run`.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"name {name!r} {describe_rule(name)}")
    record = Artifact(store, run, STAGE).sealed()
    if is_run(store, name):
        raise ConfigError(f"{name} is the name of a run at {store}; promote {run} as something else")
    return record


def move_name(
    store: str, run: str, name: str, fingerprint: str, *, after: tuple[int, Pointer | None]
) -> Pointer | None:
    """Make `name` point at a result of `run`; None if another process has moved the name since.

    after: the last move and its number, as `read_newest` has them.
    """
    number, carrier = after
    pointer = Pointer(
        schema=SCHEMA,
        run=run,
        stage=STAGE,
        fingerprint=fingerprint,
        promoted_at="",  # when it is made
        before=None if carrier is None else carrier.as_promotion(),
        back=None if carrier is None else number,
    )
    return append_move(store, name, number, pointer)


def undo_promotion(store: str, name: str) -> Pointer:
    """Make `name` point at the result that it pointed at before its last promotion; a second time, before that one.

    Raises:
        InputMissing: nobody gave the name, or the result before is gone.
        DataError: the run before has another result now.
        ConfigError: there is nothing to go back to, or another process moves the name at the same time.
    """
    number, carrier = read_newest(store, name) if re.fullmatch(NAME, name) else (BEGINNING, None)
    if carrier is None:
        raise _say_not_given(store, name)
    target = _find_target(store, name, carrier)
    if target is None:
        raise ConfigError(
            f"{name} is the export of {carrier.run}, and no promotion came before that: there is nothing to undo; "
            f"dmdr promote RUN --as {name} moves it to another run"
        )
    restored, pointer = target
    _check_result(store, pointer, f"before, {name} pointed at", f"dmdr promote RUN --as {name}")
    undo = pointer.model_copy(
        update={
            "before": carrier.as_promotion(),
            "undoes": carrier.run,
            "restores": restored if pointer.restores is None else pointer.restores,
        }
    )
    made = append_move(store, name, number, undo)
    if made is None:
        _, now = read_newest(store, name)
        run = "another run" if now is None else now.run
        raise ConfigError(
            f"{name} was moved to {run} by another process at the same time, and nothing was undone here; look at "
            f"dmdr promote --as {name}, and repeat the command if it is still wanted"
        )
    return made


def _find_target(store: str, name: str, carrier: Pointer) -> tuple[int | None, Pointer] | None:
    """What the name pointed at before it pointed at this, and the number of that move; None if there is nothing."""
    original = carrier if carrier.restores is None else read_move(store, name, carrier.restores)
    if original is None:
        return None
    if original.back is not None:
        before = read_move(store, name, original.back)
        return None if before is None else (original.back, before)
    if original.before is None or original.undoes is not None:
        return None
    old = original.before  # DMDR 0.1 knew the one before
    return None, Pointer(schema=SCHEMA, run=old.run, fingerprint=old.fingerprint, promoted_at=old.promoted_at)


def _say_not_given(store: str, name: str) -> InputMissing:
    near = difflib.get_close_matches(name, list_promoted(store), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"dmdr promote RUN --as {name} gives it"
    return InputMissing(f"no run at {store} was ever promoted as {name}; {hint}")


def follow_name(store: str, name: str) -> str:
    """The run that a promoted name points at. Any other name is returned as the name of a run.

    Raises:
        ConfigError: the promoted name is also the name of a run.
        InputMissing: the result that it points at is gone.
        DataError: the run has another result now.
    """
    if not re.fullmatch(NAME, name) or (pointer := read_newest(store, name)[1]) is None:
        return name
    run, remedy = pointer.run, f"dmdr promote RUN --as {name}"
    if is_run(store, name):
        raise ConfigError(
            f"{name} is the name of a run at {store} and also points at run {run}; delete "
            f"{store}/{PROMOTED}/{name} or the run"
        )
    _check_result(store, pointer, f"{name} points at", remedy)
    return run


def _check_result(store: str, pointer: Pointer, subject: str, remedy: str) -> None:
    """Check that the result of a pointer is still there. subject: such as "production points at"."""
    run = pointer.run
    record = Artifact(store, run, STAGE).record()
    if record is None:
        raise InputMissing(f"{subject} the {STAGE} of run {run}, which is gone from {store}; {remedy}")
    if record.fingerprint != pointer.fingerprint:
        wanted, present = shorten(pointer.fingerprint), shorten(record.fingerprint)
        raise DataError(f"{subject} result {wanted} of run {run}, whose result is {present} now; {remedy}")


def find_run(store: str, name: str) -> str:
    """`follow_name`, of a run that is there.

    Raises:
        InputMissing: no run has that name; the message names those that are like it.
        ConfigError, DataError: as `follow_name`.
    """
    run = follow_name(store, name)
    if is_name(run) and is_run(store, run):
        return run
    known = [*list_runs(store), *list_promoted(store)]
    near = difflib.get_close_matches(run.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"dmdr runs --store {store} lists what is there"
    raise InputMissing(f"there is no run {name} at {store}; {hint}")
