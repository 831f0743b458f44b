"""Fetch a file of a store and check it. A download that arrives wrong is asked for again before it is an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.store.layout import is_intact
from stages.store.records import FileDigest

if TYPE_CHECKING:
    from stages.store.folder import Folder
    from stages.store.remote import Remote

TRIES = 3


class Damaged(ValueError):
    """A file of a store is missing, or is not what its digest says. The message ends a sentence about the file."""


def fetch_intact(place: Folder | Remote, name: str, target: Path, expected: FileDigest) -> Path:
    """The local path of a file whose size and sha256 are the expected ones.

    In a folder it is the file itself, which does not change by being read again.

    Raises:
        Damaged: it is missing, or it differs each time.
    """
    for _ in range(TRIES):
        path = place.fetch(name, target)
        if path is None:
            raise Damaged("is missing")
        if is_intact(path, expected):
            return path
        if path != target:
            break
    raise Damaged("is damaged: its sha256 is not the recorded one")
