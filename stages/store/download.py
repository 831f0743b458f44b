"""Download files of a sealed artifact. An interrupted download continues where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from dmdr.errors import DataError
from stages.store.address import Address, SealT
from stages.store.intact import TRIES
from stages.store.layout import RECORD, is_intact
from stages.store.records import StoredFile
from stages.store.transfer import AT_ONCE, map_in_parallel

CHUNK = 2**23  # bytes of one request


def download(artifact: Address[SealT], names: Iterable[str], folder: Path, report: Callable[[int], None]) -> None:
    """Complete the files in `folder`, each verified against the record. Bytes that are there already are kept.

    report: called during and after each file, with the number of bytes that are complete.

    Raises:
        InputMissing: the artifact is not sealed.
        DataError: a file is missing in the store, or differs from the record.
    """
    files, before = artifact.sealed().files, 0
    for name in names:
        _complete_file(artifact, name, files[name], folder / name, partial(_report_sum, report, before))
        before += files[name].size
        report(before)


def _report_sum(report: Callable[[int], None], before: int, here: int) -> None:
    report(before + here)


def _complete_file(
    artifact: Address[SealT], name: str, expected: StoredFile, target: Path, report: Callable[[int], None]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if _matches(target, expected):
        return
    if target.is_file() and target.stat().st_size >= expected.size:
        target.unlink()
    for _ in range(TRIES):  # it may be the beginning of another file, or arrive wrong
        _continue_file(artifact, name, expected, target, report)
        if _matches(target, expected):
            return
        target.unlink()
    raise DataError(
        f"{artifact.address}/{name} is damaged: its sha256 is not the one in {RECORD}; delete {artifact.address} and "
        f"run {artifact.stage} again"
    )


def _matches(file: Path, expected: StoredFile) -> bool:
    return file.is_file() and is_intact(file, expected)


def _continue_file(
    artifact: Address[SealT], name: str, expected: StoredFile, target: Path, report: Callable[[int], None]
) -> None:
    """Append the missing bytes to `target`, as far as the store has them."""

    def read_chunk(start: int) -> bytes:
        end = min(start + CHUNK, expected.size)
        data = artifact.place.read_range(expected.stored_as or name, start, end)
        if data is None:
            raise DataError(
                f"{artifact.address}/{name} is missing; delete {artifact.address} and run {artifact.stage} again"
            )
        return data

    with target.open("ab") as file:
        while (start := file.tell()) < expected.size:
            report(start)
            end = min(start + AT_ONCE * CHUNK, expected.size)
            for data in map_in_parallel(read_chunk, range(start, end, CHUNK)):
                file.write(data)
            if file.tell() < end:
                return
