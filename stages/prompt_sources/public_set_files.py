"""The files of a named prompt set on this machine: from a folder, or fetched once into the model hub library's cache.

{HF_HOME}/assets/dmdr/prompts/default/{address}/{file}   appears whole and verified, or not at all
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dmdr.config.identity import fingerprint
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from dmdr.teacher.hub import ADDRESS, is_hub
from stages.prompt_sources.public_sets import SETS, UNPINNED, File, NamedSet, find_set

TIMEOUT = 30.0  # seconds without a byte
PAUSES = (0.5, 2.0)  # seconds between tries
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which the same may well succeed
CHUNK = 2**20
SEEN = 12  # hex digits of a digest in a message


@dataclass(frozen=True)
class Sets:
    """The sets there are, and where their files are had from."""

    folder: Path | None = None  # with the files by their names; None: they are fetched
    table: Mapping[str, NamedSet] = field(default_factory=lambda: SETS)
    cache: Path | None = None  # None: where the model hub's library keeps what it is given
    pauses: tuple[float, ...] = PAUSES

    def named(self, source: str) -> NamedSet:
        return find_set(source, self.table)

    def files(self, source: str) -> list[tuple[File, Path]]:
        """Every file of set:NAME, verified.

        Raises:
            ConfigError: there is no such set, or it has no commit to fetch.
            InputMissing: the folder lacks a file, or it cannot be read or fetched.
            DataError: a file is not the one that is promised.
            StoreError: the cache cannot be written.
        """
        return [(file, self._file(source, file)) for file in self.named(source).files]

    def _file(self, source: str, file: File) -> Path:
        if self.folder is not None:
            path = self.folder / file.name
            if not os.path.isfile(path):  # which, unlike Path.is_file, answers about a folder that is closed to us, too
                raise InputMissing(
                    f"prompt source {source}: {path} does not exist, or its folder is closed to this user; put "
                    f"{file.address} there, or take prompts.folder out, so that it is fetched"
                )
            _verify(source, file, path, f"put {file.address} there")
            return path
        if UNPINNED in file.address:
            raise ConfigError(
                f"prompt source {source} is pinned to no commit; give one of {file.address.split('@')[0]} as "
                f"{source}@COMMIT, 40 hex digits, or put {file.name} into a folder and name that in prompts.folder"
            )
        return _from_hub(source, file) if is_hub(file.address) else self._from_web(source, file)

    def _from_web(self, source: str, file: File) -> Path:
        """A file that is there already is kept if it is whole; another process that fetches it is waited for."""
        target = (self.cache or _cache()) / fingerprint(file.address)[:SEEN] / file.name
        begun = target.with_name(f".{target.name}.begun")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(f".{target.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if target.is_file() and file.sha256 in (None, sha256(target)):
                    return target
                _fetch(source, file, begun, self.pauses)
                _verify(source, file, begun, _where_else(file))
                begun.replace(target)
        except InputMissing:
            raise
        except OSError as error:
            raise StoreError(
                f"prompt source {source}: cannot write {target}: {error.strerror or error}; let HF_HOME be a "
                f"folder that is writable and has space left, or {_where_else(file)}"
            ) from error
        return target


FETCHED = Sets()


def digest_files(files: list[tuple[File, Path]]) -> str:
    """sha256 of the one file, or over (name, sha256) of several: wherever they lie."""
    found = [(file.name, sha256(path)) for file, path in files]
    if len(found) == 1:
        return found[0][1]
    return hashlib.sha256("".join(f"{name} {each}\n" for name, each in found).encode()).hexdigest()


def describe_set(named: NamedSet, files: list[tuple[File, Path]]) -> dict:
    """What is promised of a set and which files were found."""
    found = [{"address": file.address, "sha256": sha256(path)} for file, path in files]
    return {"kind": named.kind, "licence": named.licence, "promised": named.rows, "files": found}


def _cache() -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("dmdr", namespace="prompts")


def _from_hub(source: str, file: File) -> Path:
    """A file of a repository of data. The library tries again by itself, keeps it, and lets it appear whole."""
    from huggingface_hub import hf_hub_download

    pinned = ADDRESS.fullmatch(file.address)
    assert pinned is not None, file.address
    try:
        path = Path(hf_hub_download(pinned["repo"], pinned["file"], revision=pinned["commit"], repo_type="dataset"))
    except (OSError, ValueError) as error:  # no network, no such commit or file, no permission, no space
        raise _missing_error(source, file, error) from error
    _verify(source, file, path, f"delete it, then repeat the command, or {_where_else(file)}")
    return path


def _fetch(source: str, file: File, begun: Path, pauses: tuple[float, ...]) -> None:
    """Write the file to `begun`, from its beginning at every try."""
    for pause in (*pauses, None):
        try:
            _download(file.address, begun)
            return
        except urllib.error.HTTPError as error:
            if error.code not in PASSING or pause is None:
                raise _missing_error(source, file, error) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            if pause is None:
                raise _missing_error(source, file, error) from error
        time.sleep(pause)


def _download(address: str, begun: Path) -> None:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, begun.open("wb") as out:
        while chunk := answer.read(CHUNK):
            out.write(chunk)
        length = answer.headers.get("Content-Length")
        if length is not None and out.tell() != int(length):  # a connection that broke reads as an end
            raise http.client.IncompleteRead(b"", int(length) - out.tell())
        out.flush()
        os.fsync(out.fileno())


def _missing_error(source: str, file: File, error: Exception) -> InputMissing:
    said = " ".join(str(error).split())[:200]
    return InputMissing(
        f"prompt source {source}: {file.address} cannot be fetched ({type(error).__name__}: {said}); see that the "
        f"network reaches it, or {_where_else(file)}"
    )


def _where_else(file: File) -> str:
    return f"put {file.name} into a folder and name that in prompts.folder"


def _verify(source: str, file: File, path: Path, remedy: str) -> None:
    if file.sha256 is not None and (found := sha256(path)) != file.sha256:
        raise DataError(
            f"prompt source {source}: {file.name} at {path if path.name == file.name else file.address} has sha256 "
            f"{found[:SEEN]}… instead of {file.sha256[:SEEN]}…; {remedy}"
        )


def sha256(path: Path) -> str:
    """Of a file. Raises InputMissing if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror}; let this user read it, or fetch it again") from error
