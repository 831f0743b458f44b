"""The fixed names of files at an address, and digests of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stages.store.records import FileDigest

RECORD, CLAIM, CHECKPOINTS = "record.json", "claim.json", "checkpoints"
LIVE = "live"  # what an open training stage shows; no part of its result
EVENTS = "events"  # of a run, beside its stages: which events people have been told of
SPENT = "spent.json"  # beside the checkpoints: what the attempts of an open stage have used
LEASES = "lease"  # on S3: which live copy of the stage works


def digest(path: Path) -> FileDigest:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileDigest(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def is_intact(path: Path, expected: FileDigest) -> bool:
    """Whether a file has the expected size and sha256."""
    actual = digest(path)
    return (actual.size, actual.sha256) == (expected.size, expected.sha256)
