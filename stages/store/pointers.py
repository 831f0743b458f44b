"""The moves of a promoted name: each is a small file that is written once, and the last one is what the name means.

{store}/_promoted/{name}/000001.json, 000002.json, ...   the moves, in their order
                        /decisions/{run}.json            whether a run was promoted when it was last judged, and why
                 /{name}.json                            the name as DMDR 0.1 wrote it; it counts as move 0

A move is made by creating the file of the next number, which the store grants to one process only. So of processes
that move a name at once each either makes its move or learns of the other's, and no move is ever lost.
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime

from dmdr.config.names import NAME
from dmdr.errors import DataError
from stages.store.address import open_place
from stages.store.folder import Folder
from stages.store.records import Decision, Pointer, parse_json
from stages.store.remote import Remote

PROMOTED = "_promoted"  # no run can have this name
SCHEMA = 1
MOVE = re.compile(r"([^/]+)/([0-9]{6})\.json")
DECISION = re.compile(r"([^/]+)/decisions/([^/]+)\.json")
BEGINNING = 0  # the number of a pointer that DMDR 0.1 wrote


def list_pointers(store: str) -> dict[str, Pointer]:
    """Every promoted name and what it points at, by name."""
    newest: dict[str, int] = {}
    for file in open_pointers(store).names():
        move = MOVE.fullmatch(file)
        name, number = (move[1], int(move[2])) if move else (file.removesuffix(".json"), BEGINNING)
        if re.fullmatch(NAME, name) and (move or file.endswith(".json")):
            newest[name] = max(number, newest.get(name, BEGINNING))
    pointers = {name: read_move(store, name, number) for name, number in sorted(newest.items())}
    return {name: pointer for name, pointer in pointers.items() if pointer is not None}


def list_moves(store: str, name: str) -> dict[int, Pointer]:
    """The history of a name: number -> what it pointed at from then on. Empty if nobody gave it."""
    moves = {number: read_move(store, name, number) for number in _list_numbers(store, name)}
    return {number: pointer for number, pointer in moves.items() if pointer is not None}


def read_newest(store: str, name: str) -> tuple[int, Pointer | None]:
    """The last move of a name and its number; None if nobody gave the name."""
    number = max(_list_numbers(store, name), default=BEGINNING)
    return number, read_move(store, name, number)


def read_move(store: str, name: str, number: int) -> Pointer | None:
    """One move of a name; None if there is none of that number.

    Raises:
        DataError: another program wrote it.
    """
    file = _locate(name, number)
    data = open_pointers(store).read(file)
    if data is None:
        return None
    try:
        found = parse_json(data)
        pointer = Pointer.from_json(found) if isinstance(found, dict) else None
    except ValueError:
        pointer = None
    if pointer is None or pointer.version != SCHEMA:
        raise DataError(f"{store}/{PROMOTED}/{file} was not written by this DMDR; delete it and promote again")
    return pointer


def append_move(store: str, name: str, after: int, pointer: Pointer) -> Pointer | None:
    """Make the move that follows number `after`; None if another process has made one since.

    pointer: what the name is to point at. The time and the token of the move are set here.
    """
    made = pointer.model_copy(
        update={"promoted_at": datetime.now(UTC).isoformat(timespec="seconds"), "token": uuid.uuid4().hex}
    )
    data = made.to_json()
    return made if open_pointers(store).create(_locate(name, after + 1), data) == data else None


def record_decision(store: str, decision: Decision, *, replaces: bool = True) -> None:
    """Store what was decided about a run and a name. replaces: what was decided before, or else that stays."""
    place, file, data = open_pointers(store), _locate_decision(decision.name, decision.run), decision.to_json()
    if replaces:
        place.publish(file, lambda new: new.write_bytes(data))
    else:
        place.create(file, data)


def find_decision(store: str, name: str, run: str, fingerprint: str) -> Decision | None:
    """What was decided about this result of a run; None if nothing was.

    Raises:
        DataError: another program wrote it.
    """
    decision = _read_decision(store, _locate_decision(name, run))
    return decision if decision is not None and decision.fingerprint == fingerprint else None


def list_decisions(store: str) -> list[Decision]:
    """What was decided about each run and name, the oldest first."""
    files = [file for file in open_pointers(store).names() if DECISION.fullmatch(file)]
    found = [decision for file in files if (decision := _read_decision(store, file)) is not None]
    return sorted(found, key=lambda decision: decision.decided_at)


def _read_decision(store: str, file: str) -> Decision | None:
    data = open_pointers(store).read(file)
    if data is None:
        return None
    try:
        found = parse_json(data)
        decision = Decision.from_json(found) if isinstance(found, dict) else None
    except ValueError:
        decision = None
    if decision is None or decision.version != SCHEMA:
        raise DataError(f"{store}/{PROMOTED}/{file} was not written by this DMDR; delete it and promote again")
    return decision


def _locate_decision(name: str, run: str) -> str:
    return f"{name}/decisions/{run}.json"


def open_pointers(store: str) -> Folder | Remote:
    """Where the promoted names of a store lie."""
    return open_place(f"{store.rstrip('/')}/{PROMOTED}")


def _list_numbers(store: str, name: str) -> list[int]:
    moves = [MOVE.fullmatch(f"{name}/{file}") for file in open_place(f"{store.rstrip('/')}/{PROMOTED}/{name}").names()]
    return [BEGINNING, *sorted(int(move[2]) for move in moves if move)]


def _locate(name: str, number: int) -> str:
    return f"{name}/{number:06d}.json" if number > BEGINNING else f"{name}.json"
