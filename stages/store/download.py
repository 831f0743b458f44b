"""Copying files of a sealed artifact so that a download that was cut off goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from dmdr.errors import DataError
from stages.store.artifacts import Artifact
from stages.store.layout import RECORD, digest
from stages.store.transfer import AT_ONCE, map_in_parallel

CHUNK = 2**23  # bytes of one request


def download(artifact: Artifact, names: Iterable[str], folder: Path, told: Callable[[int], None]) -> None:
    """Make `folder` have the files, each as the record says; what it has of them already is kept.

    told: how many bytes are here, now and then and after each file.

    Raises:
        InputMissing: the artifact is not sealed.
        DataError: a file is missing in the store, or is not what the record says.
    """
    files, before = artifact.sealed()["files"], 0
    for name in names:
        expected, target = files[name], folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _matches(target, expected):
            if target.is_file() and target.stat().st_size >= expected["size"]:
                target.unlink()
            began = target.is_file()
            _continue_file(artifact, name, expected, target, lambda here, before=before: told(before + here))
            if began and not _matches(target, expected):  # it began as another file
                target.unlink()
                _continue_file(artifact, name, expected, target, lambda here, before=before: told(before + here))
            if not _matches(target, expected):
                target.unlink()
                raise DataError(
                    f"{artifact.address}/{name} is damaged: its sha256 is not the one in {RECORD}; delete "
                    f"{artifact.address} and run {artifact.stage} again"
                )
        before += expected["size"]
        told(before)


def _matches(file: Path, expected: dict) -> bool:
    return file.is_file() and digest(file) == {key: expected[key] for key in ("size", "sha256")}


def _continue_file(artifact: Artifact, name: str, expected: dict, target: Path, told: Callable[[int], None]) -> None:
    """Append to `target` what it lacks, or as much of it as the store has."""

    def chunk(start: int) -> bytes:
        end = min(start + CHUNK, expected["size"])
        data = artifact.place.read_range(expected.get("stored_as", name), start, end)
        if data is None:
            raise DataError(
                f"{artifact.address}/{name} is missing; delete {artifact.address} and run {artifact.stage} again"
            )
        return data

    with target.open("ab") as file:
        while (start := file.tell()) < expected["size"]:
            told(start)
            end = min(start + AT_ONCE * CHUNK, expected["size"])
            for data in map_in_parallel(chunk, range(start, end, CHUNK)):
                file.write(data)
            if file.tell() < end:
                return
