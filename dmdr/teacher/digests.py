"""sha256 of files and folders, wherever they lie: the identity of an input. No torch."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from dmdr.errors import InputMissing


@functools.cache  # each stage of a run needs it, and the files are gigabytes
def digest(path: Path) -> str:
    """sha256 of a file, or over the (relative path, sha256) of every file of a folder that `list_files` names.

    Raises:
        InputMissing: some of it cannot be read.
    """
    if path.is_file():
        try:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            _raise_unreadable(error)
    return digest_files(path, list_files(path))


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """sha256 over the (relative path, sha256) of these files of a folder. Raises as `digest` does."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder).as_posix()} {digest(file)}\n".encode())
    return total.hexdigest()


def list_files(folder: Path) -> list[Path]:
    """Every file of a folder and of the folders below it, sorted, but for hidden ones.

    Names that begin with a dot (.cache, .git, .gitattributes) belong to the tools that fetched the folder. They change
    with every fetch.

    Raises:
        InputMissing: a file or a folder cannot be read, or a link points to nothing. To skip it silently would change
            the digest.
    """
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        _require_access(parent, os.R_OK | os.X_OK)
        folders[:] = [name for name in folders if not name.startswith(".")]  # the walk goes on from here
        names = [name for name in names if not name.startswith(".")]
        for entry in (os.path.join(parent, name) for name in [*folders, *names]):
            if not os.path.exists(entry):
                raise InputMissing(f"{entry} is a link to {os.readlink(entry)}, which is not there; fetch it again")
            _require_access(entry, os.R_OK)
        files += [file for file in (Path(parent, name) for name in names) if file.is_file()]
    return sorted(files)


def _require_access(path: str, mode: int) -> None:
    if not os.access(path, mode):
        _raise_unreadable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), path))


def _raise_unreadable(error: OSError) -> NoReturn:
    raise InputMissing(
        f"cannot read {error.filename}: {error.strerror}; let this user read it, or fetch it again"
    ) from error
