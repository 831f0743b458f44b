"""Teachers in a store, published once and never changed, and the local folder behind any teacher's address.

{teachers}/{name}/{revision}/claim.json          which teacher the address belongs to, by its digest
                            /{name}@{revision}/  its files: a folder that can be a teacher.path as it is
                            /record.json         last: the seal. No record, no teacher

The protocol is that of artifacts.py; only that files are copied, and that one that is there already, whole, is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from dmdr.config.identity import fingerprint
from dmdr.config.load import validate
from dmdr.config.run import NAME, Config
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from dmdr.teacher import digests
from dmdr.teacher.index import read_index
from dmdr.teacher.load import find_diffusers_folder
from stages.store.artifacts import SCHEMA, SEEN, Artifact, open_place
from stages.store.download import CHUNK, download
from stages.store.folder import Folder, translate_errors
from stages.store.layout import RECORD
from stages.store.remote import Remote
from stages.store.s3_errors import Refused


@dataclass(frozen=True)
class Revision:
    """One teacher that never changes. digest: as `dmdr.teacher.digest`; None: not known before it is fetched."""

    name: str
    revision: str
    address: str
    digest: str | None
    record: dict | None = None  # of a published one


def publish_teacher(
    folder: str, name: str, revision: str | None, to: str, told: Callable[[int, int], None]
) -> Revision:
    """Copy a teacher into a store, each file verified there; again: go on, or find it published.

    folder: what teacher.path can be, but no single file. revision: None for the begin of its digest.
    told: how many bytes are there, and of how many, now and then.

    Raises:
        ConfigError: a name that cannot stand in an address, or one that another teacher has.
        InputMissing, DataError: there is no whole teacher of a family that DMDR knows.
        StoreError: the store refuses, or gives back other bytes than it got.
    """
    _require_name("--as", name)
    if revision is not None:
        _require_name("--revision", revision)
    source = find_diffusers_folder("FOLDER", folder)
    kind, digest = _require_whole(source), digests.digest(source)
    artifact = Artifact(to, name, digest[:SEEN] if revision is None else revision)
    try:
        record = artifact.claim({"class": kind}, {"teacher": digest})
    except Refused:
        raise
    except ConfigError as error:
        raise ConfigError(
            f"{artifact.address} belongs to another teacher than {folder}, which is sha256 {digest[:SEEN]}…; a "
            "revision never changes: give another --revision, or none"
        ) from error
    if record is None:
        files = _copy_files(source, artifact, told)
        named = {"stage": artifact.stage, "identity": {"class": kind}, "inputs": {"teacher": digest}}
        contents = {name: found["sha256"] for name, found in files.items()}
        record = {
            "schema": SCHEMA,
            "run": name,
            **named,
            "files": files,
            "fingerprint": fingerprint({**named, "files": contents}),
            "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record = json.loads(artifact.place.create(RECORD, json.dumps(record, indent=1, sort_keys=True).encode()))
    return Revision(name, artifact.stage, artifact.address, digest, record)


def list_published(prefix: str) -> list[Revision]:
    """Every teacher that was published below a prefix, by name and then by when; a begun one is not there yet."""
    found = []
    for name in filter(_is_name, open_place(prefix).folders()):
        below = f"{prefix.rstrip('/')}/{name}"
        artifacts = [Artifact(prefix, name, each) for each in filter(_is_name, open_place(below).folders())]
        records = {each: record for each in artifacts if (record := each.record()) is not None}
        of_name = [Revision(name, a.stage, a.address, r["inputs"]["teacher"], r) for a, r in records.items()]
        found += sorted(of_name, key=lambda each: (each.record or {})["published_at"])
    return found


def resolve_teacher(config: Config, address: str | None, told: Callable[[int], None]) -> Config:
    """The config with another teacher, if one is given, and with a local folder in place of a published teacher.

    told: how many bytes of it have been fetched; may raise to stop.

    Raises:
        ConfigError: the address cannot mean anything.
        InputMissing: nothing was published there.
        DataError: a file of it is missing or damaged.
    """
    path = address or config.teacher.path
    if "://" in path or os.path.isfile(Path(path, RECORD)):
        path = str(_fetch_folder(path, told))
    if path == config.teacher.path:
        return config
    parts = None if address else config.teacher.parts
    changed = {**config.model_dump(), "teacher": {**config.teacher.model_dump(), "path": path, "parts": parts}}
    return validate(changed, Config, f"teacher {address or config.teacher.path}")


def _require_whole(folder: Path) -> str:
    """The class of a pipeline whose parts are there; of its weights only the headers are read."""
    from safetensors import SafetensorError, safe_open

    files, index = digests.list_files(folder), read_index(folder)
    parts = [name for name, part in index.parts.items() if part is not None]
    lacks = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if lacks:
        raise DataError(f"teacher {folder} lacks {', '.join(lacks)}, which its model_index.json names; fetch it again")
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            raise DataError(f"teacher file {file} is damaged ({error}); fetch the teacher again") from error
    return index.class_name


def _require_name(what: str, text: str) -> None:
    if not _is_name(text):
        raise ConfigError(
            f"{what} {text!r} must be at most 63 of a-z 0-9 . _ - and begin with a letter or a digit; give another"
        )


def _is_name(text: str) -> bool:
    return re.fullmatch(NAME, text) is not None


def _copy_files(source: Path, artifact: Artifact, told: Callable[[int, int], None]) -> dict[str, dict]:
    """What the record says of the files, once each of them is in the store and was read there."""
    files = digests.list_files(source)
    named = {f"{artifact.run}@{artifact.stage}/{path.relative_to(source).as_posix()}": path for path in files}
    total, here = sum(path.stat().st_size for path in files), 0
    found: dict[str, dict] = {}
    for name, path in named.items():
        expected = found[name] = {"size": path.stat().st_size, "sha256": digests.digest(path)}
        if not _has(artifact.place, name, expected):
            artifact.place.publish(name, partial(_copy, path, expected["sha256"]))
            if not _has(artifact.place, name, expected):
                raise StoreError(f"{artifact.address}/{name} is not what was written there; repeat the command")
        here += path.stat().st_size
        told(here, total)
    return found


def _copy(source: Path, sha256: str, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise DataError(f"{source} changed while it was published; let it rest, then repeat the command")


def _has(place: Folder | Remote, name: str, expected: dict) -> bool:
    """Whether the store gives back these very bytes, and not one more."""
    found, start, size = hashlib.sha256(), 0, expected["size"]
    if size == 0:
        return place.read(name) == b""
    while start < size:
        last = start + CHUNK >= size
        wanted = size - start if last else CHUNK
        data = place.read_range(name, start, start + wanted + last)
        if data is None or len(data) != wanted:
            return False
        found.update(data)
        start += wanted
    return found.hexdigest() == expected["sha256"]


def _fetch_folder(address: str, told: Callable[[int], None]) -> Path:
    """A local folder with a published teacher, verified."""
    parts = address.rstrip("/").rsplit("/", 2)
    if len(parts) < 3 or not (_is_name(parts[1]) and _is_name(parts[2])):
        raise ConfigError(f"teacher {address} is not PREFIX/NAME/REVISION; dmdr teachers list --at PREFIX names them")
    artifact = Artifact(*parts)
    record = artifact.record()
    if record is None:
        raise InputMissing(f"no teacher is published at {address}; dmdr teachers list --at {parts[0]} names them")
    digest, folder = record["inputs"]["teacher"], f"{artifact.run}@{artifact.stage}"
    if isinstance(artifact.place, Folder):
        return _verify(artifact.place.root / folder, digest, "publish it again under another --revision")
    target = cache_folder() / digest / folder
    if not target.is_dir():
        _fetch(artifact, record, target, told)
    return _verify(target, digest, "delete it, then repeat the command")


def cache_folder() -> Path:
    """Where teachers of remote stores are kept between stages: a folder of the machine, DMDR_CACHE or ~/.cache/dmdr."""
    return Path(os.environ.get("DMDR_CACHE") or Path.home() / ".cache" / "dmdr").absolute() / "teachers"


def _verify(folder: Path, digest: str, remedy: str) -> Path:
    if not folder.is_dir() or digests.digest(folder) != digest:
        raise DataError(f"teacher {folder} is not sha256 {digest[:SEEN]}…, as it was published; {remedy}")
    return folder


def _fetch(artifact: Artifact, record: dict, target: Path, told: Callable[[int], None]) -> None:
    """Let `target` appear, whole. Another process that fetches it is waited for; what a killed one got is kept."""
    begun = target.parent / f".{target.name}.begun"
    with translate_errors("write", begun):
        begun.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return
            try:
                download(artifact, record["files"], begun, told)
            except DataError as error:
                found = str(error).split(";")[0]
                raise DataError(f"{found}; publish that teacher again under another --revision") from error
            (begun / target.name).rename(target)
            shutil.rmtree(begun)
