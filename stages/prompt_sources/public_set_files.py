"""Find the files of a public prompt set: in a folder, or fetched once into the cache of the model hub's library.

{HF_HOME}/assets/dmdr/prompts/default/{address}/{file}   appears only when it is complete and verified
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from dmdr.config.identity import fingerprint
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from dmdr.teacher.hub import ADDRESS, is_hub
from stages.prompt_sources.public_sets import SETS, UNPINNED, File, NamedSet, find_set

TIMEOUT = 30.0  # seconds without a byte
PATIENCE = 120.0  # seconds without a byte of another process that fetches the file, which tries several times
PAUSES = (0.5, 2.0)  # seconds between tries
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which the same request may succeed
CHUNK = 2**20
DIGITS = 12  # of a digest in a message and in the name of a folder


@dataclass(frozen=True)
class LocalFile:
    """A file of a set, and its path on this machine."""

    file: File
    path: Path


@dataclass(frozen=True)
class FileReport:
    """A file of a set in report.json."""

    address: str
    sha256: str


@dataclass(frozen=True)
class SetReport:
    """A set in report.json. promised: the published number of prompts, None if unknown. files: those that were read."""

    kind: Literal["training", "evaluation"]
    licence: str
    promised: int | None
    files: list[FileReport]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Sets:
    """All named sets, and where their files come from."""

    folder: Path | None = None  # holds the files under their names; None: fetch them
    table: Mapping[str, NamedSet] = field(default_factory=lambda: SETS)
    cache: Path | None = None  # None: the folder in which the model hub's library keeps other files
    pauses: tuple[float, ...] = PAUSES

    def find(self, source: str) -> NamedSet:
        """The set that set:NAME names. Raises ConfigError if there is none."""
        return find_set(source, self.table)

    def find_files(self, source: str) -> list[LocalFile]:
        """Every file of set:NAME, fetched if necessary and verified.

        Raises:
            ConfigError: there is no such set, or no commit of it is known.
            InputMissing: a file is not in the folder, or cannot be read or fetched.
            DataError: a file has another sha256 than the published one.
            StoreError: the cache cannot be written.
        """
        return [LocalFile(file, self._find_file(source, file)) for file in self.find(source).files]

    def _find_file(self, source: str, file: File) -> Path:
        if self.folder is not None:
            path = self.folder / file.name
            if not os.path.isfile(path):  # Path.is_file raises if this user may not open the folder
                raise InputMissing(
                    f"prompt source {source}: {path} does not exist, or this user may not open its folder; put "
                    f"{file.address} there, or leave prompts.folder out to have it fetched"
                )
            _verify(source, file, path, f"put {file.address} there")
            return path
        if UNPINNED in file.address:
            raise ConfigError(
                f"prompt source {source} is pinned to no commit; give one of {file.address.split('@')[0]} as "
                f"{source}@COMMIT, 40 hex digits, or put {file.name} into a folder and name that in prompts.folder"
            )
        return _fetch_from_hub(source, file) if is_hub(file.address) else self._fetch_from_web(source, file)

    def _fetch_from_web(self, source: str, file: File) -> Path:
        """Fetch a file unless the cache has it already. Waits if another process is fetching it."""
        target = (self.cache or _cache_folder()) / fingerprint(file.address)[:DIGITS] / file.name
        partial = target.with_name(f".{target.name}.begun")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(f".{target.name}.lock").open("a+") as lock:
                _wait_for(lock, source, partial)
                if target.is_file() and file.sha256 in (None, sha256(target)):
                    return target
                _fetch(source, file, partial, self.pauses)
                _verify(source, file, partial, _describe_alternative(file))
                partial.replace(target)
        except (InputMissing, StoreError):
            raise
        except OSError as error:
            raise StoreError(
                f"prompt source {source}: cannot write {target}: {error.strerror or error}; set HF_HOME to a writable "
                f"folder with free space, or {_describe_alternative(file)}"
            ) from error
        return target


def _wait_for(lock: IO[str], source: str, partial: Path) -> None:
    """Lock a file, as soon as no other process fetches the set. `partial` grows as long as that one does."""
    began, told, size, grown = time.monotonic(), False, -1, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            now, here = time.monotonic(), partial.stat().st_size if partial.is_file() else 0
        lock.seek(0)
        owner = lock.read() or "another process"
        if here != size:
            size, grown = here, now
        if not told and now - began > 2.0:
            print(f"prompt source {source}: waiting for {owner}, which fetches it", file=sys.stderr, flush=True)
            told = True
        if now - grown > PATIENCE:
            raise StoreError(
                f"prompt source {source}: {owner} fetches it and has got no byte for {PATIENCE:.0f} s; end that "
                "process with kill -9, then repeat the command"
            )
        time.sleep(0.1)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


FETCHED = Sets()


def digest_files(files: list[LocalFile]) -> str:
    """sha256 of a single file, or of the names and digests of several. Their folders do not matter."""
    if len(files) == 1:
        return sha256(files[0].path)
    lines = [f"{each.file.name} {sha256(each.path)}\n" for each in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe_set(named: NamedSet, files: list[LocalFile]) -> SetReport:
    """Describe a set and the files that were read, for report.json."""
    reports = [FileReport(each.file.address, sha256(each.path)) for each in files]
    return SetReport(named.kind, named.licence, named.rows, reports)


def _cache_folder() -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("dmdr", namespace="prompts")


def _fetch_from_hub(source: str, file: File) -> Path:
    """Fetch a file of a dataset repository. The library retries, caches, and shows only a complete file."""
    from huggingface_hub import hf_hub_download

    pinned = ADDRESS.fullmatch(file.address)
    assert pinned is not None, file.address
    try:
        path = Path(hf_hub_download(pinned["repo"], pinned["file"], revision=pinned["commit"], repo_type="dataset"))
    except (OSError, ValueError) as error:  # no network, no such commit or file, no permission, no space
        raise _missing_error(source, file, error) from error
    _verify(source, file, path, f"delete it, then repeat the command, or {_describe_alternative(file)}")
    return path


def _fetch(source: str, file: File, partial: Path, pauses: tuple[float, ...]) -> None:
    """Download the file to `partial`. Every try starts from the beginning."""
    for pause in (*pauses, None):
        try:
            _download(file.address, partial)
            return
        except urllib.error.HTTPError as error:
            if error.code not in PASSING or pause is None:
                raise _missing_error(source, file, error) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            if pause is None:
                raise _missing_error(source, file, error) from error
        time.sleep(pause)


def _download(address: str, partial: Path) -> None:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response, partial.open("wb") as out:
        while chunk := response.read(CHUNK):
            out.write(chunk)
        length = response.headers.get("Content-Length")
        if length is not None and out.tell() != int(length):  # a broken connection looks like the end of the file
            raise http.client.IncompleteRead(b"", int(length) - out.tell())
        out.flush()
        os.fsync(out.fileno())


def _missing_error(source: str, file: File, error: Exception) -> InputMissing:
    reason = " ".join(str(error).split())[:200]
    return InputMissing(
        f"prompt source {source}: {file.address} cannot be fetched ({type(error).__name__}: {reason}); check the "
        f"network, or {_describe_alternative(file)}"
    )


def _describe_alternative(file: File) -> str:
    return f"put {file.name} into a folder and name that in prompts.folder"


def _verify(source: str, file: File, path: Path, remedy: str) -> None:
    if file.sha256 is not None and (actual := sha256(path)) != file.sha256:
        raise DataError(
            f"prompt source {source}: {file.name} at {path if path.name == file.name else file.address} has sha256 "
            f"{actual[:DIGITS]}… instead of {file.sha256[:DIGITS]}…; {remedy}"
        )


def sha256(path: Path) -> str:
    """sha256 of a file. Raises InputMissing if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(
            f"cannot read {path}: {error.strerror}; make it readable for this user, or fetch it again"
        ) from error
