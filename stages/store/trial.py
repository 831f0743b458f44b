"""Try a store: it takes a file, refuses to replace it, lists, locks and deletes. Nothing stays behind."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

from dmdr.errors import StoreError
from stages.store import conditional_writes
from stages.store.address import open_place
from stages.store.folder import Folder

NAME = "trial.json"
FIRST, SECOND = b'{"trial": 1}\n', b'{"trial": 2}\n'


def try_store(store: str) -> str:
    """Try a store under an address that no run can have; returns in words what it can do.

    Raises:
        ConfigError: the store is of an unknown kind, refuses the credentials, or replaces what it must not.
        InputMissing: it has no bucket.
        StoreError: it does not answer, or cannot be written.
    """
    place = open_place(f"{store.rstrip('/')}/_check-{uuid.uuid4().hex}")
    absent = _list_absent(place.root) if isinstance(place, Folder) else []
    try:
        if place.create(NAME, FIRST) != FIRST or place.create(NAME, SECOND) != FIRST:
            raise StoreError(
                f"store {store} replaced a file that it was told to keep, so two processes of one stage could replace "
                "each other's files; choose another store"
            )
        if place.read(NAME) != FIRST or NAME not in place.names():
            raise StoreError(f"store {store} does not give back a file that it has just taken; choose another store")
        with place.alone():
            place.publish(NAME, lambda file: file.write_bytes(SECOND))
        place.remove(NAME)
        if place.read(NAME) is not None:
            raise StoreError(f"store {store} keeps a file that it was told to delete; choose another store")
    finally:
        if isinstance(place, Folder):
            _clear(place, absent)
        else:
            with suppress(OSError, ValueError):  # the error above says more
                place.remove(NAME)
    if not isinstance(place, Folder) and conditional_writes.is_ignored():
        return f"{store} takes and deletes files; {conditional_writes.VARIABLE} says that it may replace them"
    return f"{store} takes files, refuses to replace them and deletes them"


def _list_absent(folder: Path) -> list[Path]:
    """The folders above this one that are not there yet, the innermost first."""
    return [each for each in folder.parents if not each.exists()]


def _clear(place: Folder, made: list[Path]) -> None:
    """Delete the folder of the trial, and the folders above it that the trial has made and nobody has used since."""
    with suppress(StoreError):
        place.remove("")
    for folder in made:
        with suppress(OSError):
            folder.rmdir()
