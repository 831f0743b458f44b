"""The names at an address, which of these files tell the time, and the digest by which a file is known."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from stages.store.records import FileDigest

RECORD, CLAIM, CHECKPOINTS = "record.json", "claim.json", "checkpoints"
TIMED = {"provenance.json", "README.md", "SHA256SUMS", "report.html", "speed.json"}  # each in whatever folder


def tells_time(name: str) -> bool:
    """Whether a file also says how long something took. No two runs agree on that, so it is no part of a result.

    SHA256SUMS is one of them, because it holds the digests of the others.
    """
    return PurePosixPath(name).name in TIMED


def digest(path: Path) -> FileDigest:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileDigest(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def is_intact(path: Path, expected: FileDigest) -> bool:
    """Whether a file has the expected size and sha256."""
    actual = digest(path)
    return (actual.size, actual.sha256) == (expected.size, expected.sha256)
