"""Publish teachers in a store. Each revision is published once and never changed.

{teachers}/{name}/{revision}/claim.json          written first: the digest of the teacher that the address belongs to
                            /{name}@{revision}/  its files: a folder that can be a teacher.path as it is
                            /record.json         written last: the seal. Without a record there is no teacher

The protocol is the one of artifacts.py, with two differences: files are copied instead of moved, and a complete file
that is there already is kept.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from dmdr.config.names import NAME, describe_rule
from dmdr.errors import ConfigError, DataError, StoreError
from dmdr.teacher import digests
from dmdr.teacher.index import read_index
from dmdr.teacher.load import digest_pipeline, find_diffusers_folder
from stages.store.address import SHORT_DIGEST, Address, open_place, shorten
from stages.store.download import CHUNK
from stages.store.folder import Folder
from stages.store.layout import digest
from stages.store.records import SCHEMA, Claim, StoredFile, TeacherRecord, fingerprint_result
from stages.store.remote import Remote
from stages.store.s3_errors import Refused


@dataclass(frozen=True)
class Revision:
    """One revision of a teacher, which never changes.

    known_as: the digests by which a run may know it, that of today's runs first; empty if they are unknown.
    """

    name: str
    revision: str
    address: str
    known_as: tuple[str, ...]


@dataclass(frozen=True)
class PublishedTeacher(Revision):
    """A revision that is sealed in a store. digest: sha256 over all its files."""

    digest: str
    record: TeacherRecord


class TeacherAddress(Address[TeacherRecord]):
    """One revision of one teacher in a store."""

    def __init__(self, prefix: str, name: str, revision: str) -> None:
        super().__init__(prefix, name, revision, TeacherRecord)

    def _describe_foreign(self, name: str) -> str:
        return (
            f"{self.address}/{name} does not belong to a published teacher; give an address that "
            f"dmdr teachers list --at {self.store} names"
        )


def publish_teacher(
    folder: str, name: str, revision: str | None, to: str, report: Callable[[int, int], None]
) -> PublishedTeacher:
    """Copy a teacher into a store and verify each file there. A repeated call continues an interrupted copy.

    folder: as teacher.path, but no single file. revision: None for the beginning of the teacher's digest.
    report: called after each file with the number of bytes that are copied, and of all bytes.

    Raises:
        ConfigError: a name cannot stand in an address, or another teacher has it already.
        InputMissing, DataError: there is no complete teacher of a family that DMDR knows.
        StoreError: the store fails, or returns other bytes than were written.
    """
    _require_name("--as", name)
    if revision is not None:
        _require_name("--revision", revision)
    source = find_diffusers_folder("FOLDER", folder)
    kind, teacher = _require_whole(source), digests.digest(source)
    address = TeacherAddress(to, name, teacher[:SHORT_DIGEST] if revision is None else revision)
    identity: dict[str, object] = {"class": kind}
    inputs = {"teacher": teacher}
    try:
        record = address.claim(identity, inputs)
    except Refused:
        raise
    except ConfigError as error:
        raise ConfigError(
            f"{address.address} belongs to another teacher than {folder}, which is sha256 {shorten(teacher)}; a "
            "revision never changes: give another --revision, or none"
        ) from error
    if record is None:
        files = _copy_files(source, address, report)
        claim = Claim(schema=SCHEMA, run=name, stage=address.stage, identity=identity, inputs=inputs)
        record = address.write_record(
            TeacherRecord(
                schema=claim.version,
                run=claim.run,
                stage=claim.stage,
                identity=identity,
                inputs=inputs,
                files=files,
                fingerprint=fingerprint_result(claim, files),
                pipeline=digest_pipeline(source),
                published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )
    return _describe(address, record)


def list_published(prefix: str) -> list[PublishedTeacher]:
    """Every teacher that is published below a prefix, ordered by name and then by time.

    A teacher that is still being copied is left out.
    """
    teachers = []
    for name in filter(is_name, open_place(prefix).folders()):
        below = open_place(f"{prefix.rstrip('/')}/{name}")
        addresses = [TeacherAddress(prefix, name, revision) for revision in filter(is_name, below.folders())]
        revisions = [_describe(address, record) for address in addresses if (record := address.record()) is not None]
        teachers += sorted(revisions, key=lambda teacher: teacher.record.published_at)
    return teachers


def _describe(address: TeacherAddress, record: TeacherRecord) -> PublishedTeacher:
    digest = record.teacher_digest
    known_as = (record.pipeline, digest) if record.pipeline is not None else ()
    return PublishedTeacher(address.run, address.stage, address.address, known_as, digest, record)


def is_name(text: str) -> bool:
    """Whether a text may be the name or the revision of a teacher."""
    return re.fullmatch(NAME, text) is not None


def teacher_name(path: str) -> str:
    """The name of a teacher, which means the same on every machine.

    It is lab:flow or hub:OWNER/NAME@COMMIT as given, the last part of a folder's path, or NAME@REVISION of a published
    teacher.
    """
    if "://" in path:
        return "@".join(path.rstrip("/").split("/")[-2:])
    return path if path.startswith(("lab:", "hub:")) else Path(path).name


def _require_whole(folder: Path) -> str:
    """Check that a pipeline has all its parts, and return its class. Of the weights only the headers are read."""
    from safetensors import SafetensorError, safe_open

    files, index = digests.list_files(folder), read_index(folder)
    parts = [name for name, part in index.parts.items() if part is not None]
    missing = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing:
        raise DataError(
            f"teacher {folder} lacks {', '.join(missing)}, which its model_index.json names; fetch it again"
        )
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            raise DataError(f"teacher file {file} is damaged ({error}); fetch the teacher again") from error
    return index.class_name


def _require_name(option: str, text: str) -> None:
    if not is_name(text):
        raise ConfigError(f"{option} {text!r} {describe_rule(text)}")


def _copy_files(source: Path, address: TeacherAddress, report: Callable[[int, int], None]) -> dict[str, StoredFile]:
    """Copy the files into the store and verify each by reading it there. Returns them as the record lists them."""
    files = digests.list_files(source)
    total, here = sum(path.stat().st_size for path in files), 0
    copied = {}
    for path in files:
        name = f"{address.run}@{address.stage}/{path.relative_to(source).as_posix()}"
        expected = StoredFile(size=path.stat().st_size, sha256=digests.digest(path))
        if not _holds(address.place, name, expected):
            address.place.publish(name, partial(_copy, path, expected))
            if not _holds(address.place, name, expected):
                raise StoreError(
                    f"{address.address}/{name} has other bytes than were written there; repeat the command"
                )
        copied[name] = expected
        here += expected.size
        report(here, total)
    return copied


def _copy(source: Path, expected: StoredFile, target: Path) -> None:
    shutil.copyfile(source, target)
    if digest(target).sha256 != expected.sha256:
        raise DataError(
            f"{source} changed while it was published; wait until nothing writes to it, then repeat the command"
        )


def _holds(place: Folder | Remote, name: str, expected: StoredFile) -> bool:
    """Whether the store has the file with exactly the expected bytes."""
    if expected.size == 0:
        return place.read(name) == b""
    content, start = hashlib.sha256(), 0
    while start < expected.size:
        is_last = start + CHUNK >= expected.size
        wanted = expected.size - start if is_last else CHUNK
        one_more = 1 if is_last else 0  # a longer file has a byte there
        data = place.read_range(name, start, start + wanted + one_more)
        if data is None or len(data) != wanted:
            return False
        content.update(data)
        start += wanted
    return content.hexdigest() == expected.sha256
