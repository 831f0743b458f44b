"""The names that lie at an address, which of them tell the time, and the digest by which files there are known."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

RECORD, CLAIM, CHECKPOINTS = "record.json", "claim.json", "checkpoints"
TIMED = {"provenance.json", "README.md", "SHA256SUMS", "report.html", "speed.json"}  # each in whatever folder


def tells_time(name: str) -> bool:
    """Whether a file also says how long something took, which no two runs agree on: that is no part of a result.

    SHA256SUMS does, by the digests of the others.
    """
    return PurePosixPath(name).name in TIMED


def digest(path: Path) -> dict[str, int | str]:
    """{"size", "sha256"} of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
