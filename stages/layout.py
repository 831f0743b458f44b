"""The names that lie at an address, and the digest by which files there are known."""

from __future__ import annotations

import hashlib
from pathlib import Path

RECORD, CLAIM, CHECKPOINTS = "record.json", "claim.json", "checkpoints"


def digest(path: Path) -> dict[str, int | str]:
    """{"size", "sha256"} of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
