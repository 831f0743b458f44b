"""Read a JSON file of a teacher: an object, or one line that says why it is none. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from dmdr.errors import DataError, InputMissing

LARGEST = 64 * 2**20  # bytes; a vocabulary is the largest of such files


def read_object(file: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        InputMissing: it cannot be read.
        DataError: it is no JSON object, or larger than any file of its kind.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except OSError as error:
        raise InputMissing(f"cannot read {file}: {error.strerror}; let this user read it, or fetch it again") from error
    if len(data) > LARGEST:
        raise DataError(f"teacher file {file} is larger than any configuration; fetch the teacher again")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"teacher file {file} is not JSON ({error}); fetch the teacher again") from error
    if not isinstance(found, dict):
        raise DataError(f"teacher file {file} is no JSON object; fetch the teacher again")
    return found
