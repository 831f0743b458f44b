"""Resolve a teacher's address to a local folder. A published teacher is fetched once to each machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dmdr.config.load import validate
from dmdr.config.run import Config
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.teacher import digests
from stages.store import locks
from stages.store.address import shorten
from stages.store.download import download
from stages.store.folder import Folder, translate_errors
from stages.store.layout import RECORD
from stages.store.published_teachers import TeacherAddress, is_name
from stages.store.records import TeacherRecord


def resolve_teacher(config: Config, address: str | None, report: Callable[[int], None]) -> Config:
    """Replace the config's teacher by the one at `address`, if given, and a published teacher by its local folder.

    report: called with the number of bytes that have been fetched. It may raise an error to stop.

    Raises:
        ConfigError: the address has a wrong form.
        InputMissing: no teacher is published there.
        DataError: a file of it is missing or damaged.
    """
    path = address or config.teacher.path
    if "://" in path or os.path.isfile(Path(path, RECORD)):
        path = str(_fetch_folder(path, report))
    if path == config.teacher.path:
        return config
    parts = None if address else config.teacher.parts
    changed = {**config.model_dump(), "teacher": {**config.teacher.model_dump(), "path": path, "parts": parts}}
    return validate(changed, Config, f"teacher {address or config.teacher.path}")


def cache_folder() -> Path:
    """The folder of this machine that keeps teachers of remote stores: DMDR_CACHE or ~/.cache/dmdr, /teachers."""
    return Path(os.environ.get("DMDR_CACHE") or Path.home() / ".cache" / "dmdr").absolute() / "teachers"


def _fetch_folder(url: str, report: Callable[[int], None]) -> Path:
    """The local folder of a published teacher, fetched if necessary and verified."""
    parts = url.rstrip("/").rsplit("/", 2)
    if len(parts) < 3 or not (is_name(parts[1]) and is_name(parts[2])):
        raise ConfigError(f"teacher {url} is not PREFIX/NAME/REVISION; dmdr teachers list --at PREFIX names them")
    address = TeacherAddress(*parts)
    record = address.record()
    if record is None:
        raise InputMissing(f"no teacher is published at {url}; dmdr teachers list --at {address.store} names them")
    digest, folder = record.teacher_digest, f"{address.run}@{address.stage}"
    if isinstance(address.place, Folder):
        return _verify(address.place.root / folder, digest, "publish it again under another --revision")
    target = cache_folder() / digest / folder
    if not target.is_dir():
        _fetch(address, record, target, report)
    return _verify(target, digest, "delete it, then repeat the command")


def _verify(folder: Path, digest: str, remedy: str) -> Path:
    if not folder.is_dir() or digests.digest(folder) != digest:
        raise DataError(f"teacher {folder} does not have the sha256 {shorten(digest)} of the published one; {remedy}")
    return folder


def _fetch(address: TeacherAddress, record: TeacherRecord, target: Path, report: Callable[[int], None]) -> None:
    """Download a teacher to `target`, which appears only when it is complete.

    Waits if another process is fetching it, and continues the download of a killed process.
    """
    partial, note = target.parent / f".{target.name}.begun", target.parent / f".{target.name}.lock"
    doing = f"fetches the teacher {address.address}"
    with translate_errors("write", partial):
        partial.mkdir(parents=True, exist_ok=True)
        with note.open("ab") as lock:
            locks.wait_for(lock.fileno(), doing, lambda: locks.parse_present(note.read_bytes()))
            if target.is_dir():
                return
            with locks.announce(note, doing):
                _complete(address, record, partial, report)
            (partial / target.name).rename(target)
            shutil.rmtree(partial)


def _complete(address: TeacherAddress, record: TeacherRecord, folder: Path, report: Callable[[int], None]) -> None:
    """Fetch what is missing in `folder` of a teacher's files."""
    try:
        download(address, record.files, folder, report)
    except DataError as error:
        problem = str(error).split(";")[0]
        raise DataError(f"{problem}; publish that teacher again under another --revision") from error
