"""The files that a source names: one file, perhaps gzipped, or all prompt files of a folder or a glob pattern."""

from __future__ import annotations

import glob
import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmdr.errors import ConfigError, InputMissing
from stages.prompt_sources.formats import READERS
from stages.prompt_sources.lines import ByteReader

GZIP = ".gz"
BUFFER = 2**16  # bytes that can be looked at before they are read


def find_format(path: Path) -> str | None:
    """The ending in READERS that says how a file is read; None if there is none. Parquet is compressed in itself."""
    inner = path.with_suffix("") if path.suffix.lower() == GZIP else path
    ending = inner.suffix.lower()
    return ending if ending in READERS and (inner == path or ending != ".parquet") else None


def find_files(source: str, lists: str) -> list[Path]:
    """The files of a source, by name. lists: the sources that are no files, for the message.

    Raises:
        ConfigError: the file has an unknown format.
        InputMissing: there is no such file, or no file of a known format in the folder or of the pattern.
    """
    path = Path(source)
    endings = f"{', '.join(READERS)}, or one of them and {GZIP}"
    if os.path.isdir(path):
        found = sorted(each for each in path.rglob("*") if not _is_hidden(each.relative_to(path)) and find_format(each))
    elif glob.has_magic(source) and not os.path.exists(path):
        found = sorted(each for each in map(Path, glob.glob(source, recursive=True)) if find_format(each))
    elif find_format(path) is None:
        raise ConfigError(
            f"prompt source {source} has an unknown format; give {lists}, set:NAME, a folder, or a file that ends in "
            f"{endings}"
        )
    elif not os.path.isfile(path):
        raise InputMissing(
            f"prompt source {source} is not a file, or this user may not open its folder; correct prompts.sources or "
            "prompts.evaluation"
        )
    else:
        return [path]
    if not found:
        raise InputMissing(f"prompt source {source} has no file that ends in {endings}; correct prompts.sources")
    return found


def _is_hidden(path: Path) -> bool:
    """Whether it is, or lies in, what tools keep beside files: .cache, .git, ._name."""
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def open_file(path: Path) -> Iterator[ByteReader]:
    """Open a file of a source, unzipped."""
    with open(path, "rb") as file:
        if path.suffix.lower() != GZIP:
            with io.BufferedReader(file.raw, BUFFER) as reader:
                yield reader
            return
        with gzip.open(file) as unzipped, io.BufferedReader(unzipped, BUFFER) as reader:
            yield reader
