"""List the runs of a store, and promote runs under names that other programs use.

{store}/{run}/...                  see artifacts.py
       /_promoted/{name}.json      points at the export of a run; the only file of a store that may change

The file holds the fingerprint of the result. So if a run is deleted and made again under its old name, it must be
promoted again before the promoted name means the new result.
"""

from __future__ import annotations

import difflib
import re
from datetime import UTC, datetime
from typing import Literal

from dmdr.config.names import NAME, describe_rule, is_name
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError, DataError, InputMissing
from stages.store.address import open_place, shorten
from stages.store.artifacts import Artifact
from stages.store.folder import Folder
from stages.store.records import Pointer, parse_json
from stages.store.remote import Remote

PROMOTED = "_promoted"  # no run can have this name
SCHEMA = 1
STAGE: Literal["export"] = "export"


def list_runs(store: str) -> list[str]:
    """The names of all runs, including those that have sealed nothing yet."""
    return [name for name in open_place(store).folders() if re.fullmatch(NAME, name) and is_run(store, name)]


def is_run(store: str, name: str) -> bool:
    """Whether the store has a folder of that name with a stage in it."""
    return not set(STAGES).isdisjoint(open_place(f"{store.rstrip('/')}/{name}").folders())


def list_promoted(store: str) -> dict[str, Pointer]:
    """Every promoted name and what it points at."""
    place = _open_pointers(store)
    names = [name.removesuffix(".json") for name in place.names() if name.endswith(".json")]
    pointers = {name: _read_pointer(store, name) for name in names if re.fullmatch(NAME, name)}
    return {name: pointer for name, pointer in pointers.items() if pointer is not None}


def promote_run(store: str, run: str, name: str) -> Pointer:
    """Make `name` point at the sealed export of `run`; returns the pointer, which includes the one before.

    Raises:
        ConfigError: the name cannot stand in an address, or is the name of a run.
        InputMissing: the export is not sealed.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"name {name!r} {describe_rule(name)}")
    record = Artifact(store, run, STAGE).sealed()
    if is_run(store, name):
        raise ConfigError(f"{name} is the name of a run at {store}; promote {run} as something else")
    before = _read_pointer(store, name)
    pointer = Pointer(
        schema=SCHEMA,
        run=run,
        stage=STAGE,
        fingerprint=record.fingerprint,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        before=None if before is None else before.as_promotion(),
    )
    _open_pointers(store).publish(f"{name}.json", lambda file: file.write_bytes(pointer.to_json()))
    return pointer


def follow_name(store: str, name: str) -> str:
    """The run that a promoted name points at. Any other name is returned as the name of a run.

    Raises:
        ConfigError: the promoted name is also the name of a run.
        InputMissing: the result that it points at is gone.
        DataError: the run has another result now.
    """
    if not re.fullmatch(NAME, name) or (pointer := _read_pointer(store, name)) is None:
        return name
    run, remedy = pointer.run, f"dmdr promote RUN --as {name}"
    if is_run(store, name):
        raise ConfigError(
            f"{name} is the name of a run at {store} and also points at run {run}; delete "
            f"{store}/{PROMOTED}/{name}.json or the run"
        )
    record = Artifact(store, run, STAGE).record()
    if record is None:
        raise InputMissing(f"{name} points at the {STAGE} of run {run}, which is gone from {store}; {remedy}")
    if record.fingerprint != pointer.fingerprint:
        wanted, present = shorten(pointer.fingerprint), shorten(record.fingerprint)
        raise DataError(f"{name} points at result {wanted} of run {run}, whose result is {present} now; {remedy}")
    return run


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


def _open_pointers(store: str) -> Folder | Remote:
    return open_place(f"{store.rstrip('/')}/{PROMOTED}")


def _read_pointer(store: str, name: str) -> Pointer | None:
    data = _open_pointers(store).read(f"{name}.json")
    if data is None:
        return None
    try:
        found = parse_json(data)
        pointer = Pointer.from_json(found) if isinstance(found, dict) else None
    except ValueError:
        pointer = None
    if pointer is None or pointer.version != SCHEMA:
        raise DataError(f"{store}/{PROMOTED}/{name}.json was not written by this DMDR; delete it and promote again")
    return pointer
