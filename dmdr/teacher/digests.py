"""sha256 of files and folders, wherever they lie: an input's identity. No torch."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from pathlib import Path
from typing import NoReturn

from dmdr.errors import InputMissing


@functools.cache  # a run asks at each stage, and these are gigabytes
def digest(path: Path) -> str:
    """sha256 of a file, or over the (relative path, sha256) of every file of a folder.

    Raises:
        InputMissing: some of it cannot be read.
    """
    if path.is_file():
        try:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            _unreadable(error)
    total = hashlib.sha256()
    for file in list_files(path):
        total.update(f"{file.relative_to(path).as_posix()} {digest(file)}\n".encode())
    return total.hexdigest()


def list_files(folder: Path) -> list[Path]:
    """Every file of a folder and those below it, sorted.

    Raises:
        InputMissing: one of them, or a folder, cannot be read, or is a link to nothing: it would not be missed.
    """
    found = []
    for above, folders, names in os.walk(folder, onerror=_unreadable):
        _check(above, os.R_OK | os.X_OK)
        for path in (os.path.join(above, name) for name in [*folders, *names]):
            if not os.path.exists(path):
                raise InputMissing(f"{path} is a link to {os.readlink(path)}, which is not there; fetch it again")
            _check(path, os.R_OK)
        found += [path for name in names if (path := Path(above, name)).is_file()]
    return sorted(found)


def _check(path: str, mode: int) -> None:
    if not os.access(path, mode):
        _unreadable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), path))


def _unreadable(error: OSError) -> NoReturn:
    raise InputMissing(
        f"cannot read {error.filename}: {error.strerror}; let this user read it, or fetch it again"
    ) from error
