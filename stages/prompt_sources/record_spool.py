"""Records that have to wait until all are known, on disk: a million of them would take a gigabyte of memory."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable

from dmdr.config.prompt_record import PromptRecord


class RecordSpool:
    """A list of records in a temporary file, which the system deletes with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as this object exists
        self._starts = array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, record: PromptRecord) -> None:
        self._starts.append(self._file.tell())
        self._file.write(json.dumps(record).encode() + b"\n")

    def select(self, indices: Iterable[int]) -> list[PromptRecord]:
        """The records at `indices`. Nothing can be appended afterwards."""
        found: list[PromptRecord] = []
        for index in indices:
            self._file.seek(self._starts[index])
            found.append(json.loads(self._file.readline()))
        return found
