"""Publishing teachers in a store: each revision is published once and never changed.

{teachers}/{name}/{revision}/claim.json          which teacher the address belongs to, by its digest
                            /{name}@{revision}/  its files: a folder that can be a teacher.path as it is
                            /record.json         last: the seal. No record, no teacher

The protocol is that of artifacts.py, with two differences: files are copied, and a whole file that is there already is
kept.
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

from dmdr.config.run import NAME
from dmdr.errors import ConfigError, DataError, StoreError
from dmdr.teacher import digests
from dmdr.teacher.index import read_index
from dmdr.teacher.load import find_diffusers_folder
from stages.store.address import SHORT_DIGEST, Address, open_place, shorten
from stages.store.download import CHUNK
from stages.store.folder import Folder
from stages.store.layout import digest
from stages.store.records import SCHEMA, Claim, StoredFile, TeacherRecord, fingerprint_result
from stages.store.remote import Remote
from stages.store.s3_errors import Refused


@dataclass(frozen=True)
class Revision:
    """One teacher that never changes. digest: as `dmdr.teacher.digest`; None: not known before it is fetched."""

    name: str
    revision: str
    address: str
    digest: str | None


@dataclass(frozen=True)
class PublishedTeacher(Revision):
    """A revision that is sealed in a store."""

    digest: str
    record: TeacherRecord


class TeacherAddress(Address[TeacherRecord]):
    """One revision of one teacher in a store."""

    def __init__(self, prefix: str, name: str, revision: str) -> None:
        super().__init__(prefix, name, revision, TeacherRecord)

    def _describe_foreign(self, name: str) -> str:
        return (
            f"{self.address}/{name} is not of a published teacher; give an address that dmdr teachers list --at "
            f"{self.store} names"
        )


def publish_teacher(
    folder: str, name: str, revision: str | None, to: str, report: Callable[[int, int], None]
) -> PublishedTeacher:
    """Copy a teacher into a store, each file verified there. A repeated call goes on, or finds it published.

    folder: what teacher.path can be, but no single file. revision: None for the beginning of its digest.
    report: called now and then with the number of bytes that are there, and that there will be.

    Raises:
        ConfigError: a name that cannot stand in an address, or one that another teacher has.
        InputMissing, DataError: there is no whole teacher of a family that DMDR knows.
        StoreError: the store refuses, or gives back other bytes than it got.
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
                published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )
    return PublishedTeacher(name, address.stage, address.address, teacher, record)


def list_published(prefix: str) -> list[PublishedTeacher]:
    """Every teacher that is published below a prefix, by name and then by time; one that is still being copied is not
    there yet."""
    teachers = []
    for name in filter(is_name, open_place(prefix).folders()):
        below = open_place(f"{prefix.rstrip('/')}/{name}")
        addresses = [TeacherAddress(prefix, name, revision) for revision in filter(is_name, below.folders())]
        revisions = [
            PublishedTeacher(name, address.stage, address.address, record.inputs["teacher"], record)
            for address in addresses
            if (record := address.record()) is not None
        ]
        teachers += sorted(revisions, key=lambda teacher: teacher.record.published_at)
    return teachers


def is_name(text: str) -> bool:
    """Whether a text can be the name or the revision of a teacher."""
    return re.fullmatch(NAME, text) is not None


def teacher_name(path: str) -> str:
    """A teacher by a name that means something elsewhere.

    lab:flow and hub:OWNER/NAME@COMMIT stay; a folder gives its own name, a published teacher NAME@REVISION.
    """
    if "://" in path:
        return "@".join(path.rstrip("/").split("/")[-2:])
    return path if path.startswith(("lab:", "hub:")) else Path(path).name


def _require_whole(folder: Path) -> str:
    """The class of a pipeline whose parts are there; of its weights only the headers are read."""
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
        raise ConfigError(
            f"{option} {text!r} must be at most 63 of a-z 0-9 . _ - and begin with a letter or a digit; give another"
        )


def _copy_files(source: Path, address: TeacherAddress, report: Callable[[int, int], None]) -> dict[str, StoredFile]:
    """The files as the record describes them, once each of them is in the store and was read there."""
    files = digests.list_files(source)
    total, here = sum(path.stat().st_size for path in files), 0
    copied = {}
    for path in files:
        name = f"{address.run}@{address.stage}/{path.relative_to(source).as_posix()}"
        expected = StoredFile(size=path.stat().st_size, sha256=digests.digest(path))
        if not _holds(address.place, name, expected):
            address.place.publish(name, partial(_copy, path, expected))
            if not _holds(address.place, name, expected):
                raise StoreError(f"{address.address}/{name} is not what was written there; repeat the command")
        copied[name] = expected
        here += expected.size
        report(here, total)
    return copied


def _copy(source: Path, expected: StoredFile, target: Path) -> None:
    shutil.copyfile(source, target)
    if digest(target).sha256 != expected.sha256:
        raise DataError(f"{source} changed while it was published; let it rest, then repeat the command")


def _holds(place: Folder | Remote, name: str, expected: StoredFile) -> bool:
    """Whether the store gives back exactly these bytes."""
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
