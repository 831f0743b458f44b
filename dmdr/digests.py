"""sha256 of files and folders, wherever they lie: an input's identity. No torch."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache  # a run asks at each stage, and these are gigabytes
def digest(path: Path) -> str:
    """sha256 of a file, or over the (relative path, sha256) of every file of a folder."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    total = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        total.update(f"{file.relative_to(path).as_posix()} {digest(file)}\n".encode())
    return total.hexdigest()
