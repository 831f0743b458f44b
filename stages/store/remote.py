"""An artifact store on any fsspec filesystem but the local one, S3 before all; the only file that knows fsspec.

An object is whole or invisible there by itself. None is ever overwritten by `create` and `add`. Listings are never
cached, and what is true is read from the object itself.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import fsspec

from dmdr.errors import ConfigError, InputMissing, StoreError
from stages.store import conditional_writes, transfer
from stages.store.listing import list_names
from stages.store.s3_errors import build_error, error_code, is_expired, is_taken, retry

P = ParamSpec("P")
T = TypeVar("T")

S3 = {
    "max_concurrency": 1,  # transfer.py has what goes in parallel
    "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 60},  # seconds
}
SHOWN = 12  # hex digits of the digest in the second name of a file


class Remote:
    """The objects of one address on any fsspec filesystem but the local one; the same methods as Folder."""

    def __init__(self, url: str) -> None:
        self.is_s3 = url.startswith("s3://")
        options = S3 if self.is_s3 else {}
        try:  # a cached listing would hide what another process wrote
            self.fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"store {url}: {error}; give a folder or s3://BUCKET/PREFIX") from error
        if self.is_s3:
            self.fs.retries = 1  # see refusals.py
        self.url = url
        self._scratch: tempfile.TemporaryDirectory | None = None

    @contextmanager
    def _asked(self, action: str, name: str = "") -> Iterator[None]:
        """A remote filesystem raises whatever its client library raises: all of it becomes one line."""
        try:
            yield
        except (StoreError, ConfigError, InputMissing):
            raise
        except Exception as error:
            raise build_error(error, action, f"{self.url}/{name}") from error

    def _renewing(self, ask: Callable[P, T]) -> Callable[P, T]:
        """`ask`, which is asked once more with new credentials, as files and identities have them, if ours expired."""

        def asked(*values: P.args, **named: P.kwargs) -> T:
            try:
                return ask(*values, **named)
            except Exception as error:
                if not is_expired(error):
                    raise
            self.fs.connect(refresh=True)
            return ask(*values, **named)

        return asked

    def _patiently(self, ask: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
        return retry(self._renewing(ask), *values, **named)

    def _call(self, operation: str, **parameters: object) -> dict:
        """An operation of S3, by name."""
        return self._renewing(self.fs.call_s3)(operation, **parameters)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        with self._asked("read", name):
            return _unless_missing(self._patiently, self.fs.cat_file, self._path(name))

    def create(self, name: str, data: bytes) -> bytes:
        with self._asked("write", name):
            if conditional_writes.is_ignored():
                return self._create_unconditionally(name, data)
            self._ensure_conditions()
            try:
                self._patiently(self.fs.pipe_file, self._path(name), data, mode="create")
            except Exception as error:
                # Written by somebody, or by us while the answer got lost: what stands there decides.
                if not is_taken(error) or (found := self.read(name)) is None:
                    raise
                return found
        return data

    def _create_unconditionally(self, name: str, data: bytes) -> bytes:
        if (found := self.read(name)) is not None:
            return found
        self._patiently(self.fs.pipe_file, self._path(name), data)
        if (found := self.read(name)) is None:
            raise FileNotFoundError("it was gone right after it was written")
        return found

    def _ensure_conditions(self) -> None:
        path = f"{self.root.rpartition('/')[0]}/probe-{uuid.uuid4().hex}"  # where no stage tidies up
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"?")
            file.flush()
            writes = [lambda: self._renewing(self.fs.pipe_file)(path, b"?", mode="create")] * 2
            if self.is_s3:  # some honour the condition on plain writes only
                writes.append(lambda: self._upload(path, Path(file.name), create=True))
            store = "/".join(self.url.split("/")[:3])
            conditional_writes.ensure_honoured(store, writes, lambda: self._delete(path))

    def publish(self, name: str, write: Callable[[Path], object]) -> None:
        with self._asked("write", name), tempfile.NamedTemporaryFile(dir=self.scratch()) as file:
            write(Path(file.name))
            self._put(self._path(name), Path(file.name), create=False)

    def add(self, name: str, source: Path, digest: str) -> str:
        named = f"{name}~{digest[:SHOWN]}"
        with self._asked("write", name):
            if conditional_writes.is_ignored():
                self._put(self._path(named), source, create=False)
                return named
            for stored in (name, named):
                try:
                    self._put(self._path(stored), source, create=True)
                    return stored
                except Exception as error:
                    if not is_taken(error):
                        raise
                    if self._holds(self._path(stored), source):
                        return stored
            raise FileExistsError(f"other bytes stand there and at {named}; delete both")

    def _put(self, path: str, source: Path, *, create: bool) -> None:
        size = source.stat().st_size
        if not self.is_s3 or size < 2 * transfer.PART:
            mode = "create" if create else "overwrite"
            self._patiently(self.fs.put_file, str(source), path, mode=mode)
            return
        try:
            self._upload(path, source, create=create)
        except FileNotFoundError as error:
            # Completed, the answer lost, and asked again for an upload that is no more.
            if error_code(error) != "NoSuchUpload" or not self._holds(path, source):
                raise
        if (found := self._size(path)) != size:
            raise OSError(f"it has {found} bytes where {size} were sent")

    def _upload(self, path: str, source: Path, *, create: bool) -> None:
        bucket, key, _ = self.fs.split_path(path)
        transfer.upload(self._call, bucket, key, source, create=create)

    def _holds(self, path: str, source: Path) -> bool:
        return bool(_unless_missing(transfer.is_same, self._reader(path), partial(self._size, path), source))

    def _size(self, path: str) -> int:
        return self._patiently(self.fs.size, path)

    def _reader(self, path: str) -> transfer.Read:
        def read(start: int, end: int) -> bytes:
            try:
                return self._patiently(self.fs.cat_file, path, start=start, end=end)
            except OSError as error:
                if error_code(error) == "InvalidRange":  # the object ends before it
                    return b""
                raise

        return read

    def fetch(self, name: str, target: Path) -> Path | None:
        path = self._path(name)
        with self._asked("read", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            return _unless_missing(transfer.download, self._reader(path), partial(self._size, path), target)

    def read_range(self, name: str, start: int, end: int) -> bytes | None:
        with self._asked("read", name):
            return _unless_missing(self._reader(self._path(name)), start, end)

    def names(self) -> list[str]:
        with self._asked("list"):
            return sorted(path.removeprefix(f"{self.root}/") for path in self._at(self.root))

    def folders(self) -> list[str]:
        with self._asked("list"):
            if self.is_s3:
                bucket, key, _ = self.fs.split_path(self.root)
                found = list_names(self._call, bucket, f"{key}/" if key else "", folders=True)
            else:
                entries: list[dict] = _unless_missing(self._patiently, self.fs.ls, self.root, detail=True) or []
                found = [each["name"] for each in entries if each["type"] == "directory"]
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def remove(self, name: str) -> None:
        """Object by object: asked for many at once, s3fs does not tell which ones the store kept."""
        with self._asked("delete", name):
            transfer.map_in_parallel(self._delete, self._at(self._path(name)))

    def _at(self, path: str) -> list[str]:
        """The object of that path, if there is one, and all below it."""
        if not self.is_s3:
            return self._patiently(self.fs.find, path)
        bucket, key, _ = self.fs.split_path(path)
        found = list_names(self._call, bucket, key)
        return [f"{bucket}/{each}" for each in found if each == key or each.startswith(f"{key}/")]

    def _delete(self, path: str) -> None:
        _unless_missing(self._patiently, self.fs.rm_file, path)

    def scratch(self) -> Path:
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="dmdr-", ignore_cleanup_errors=True)
        return Path(self._scratch.name)

    def tidy(self) -> None:
        """Nothing to do: an upload that was cut off is not visible."""

    def alone(self) -> nullcontext:
        """No lock is needed where nothing is overwritten."""
        return nullcontext()


def _unless_missing(ask: Callable[P, T], *values: P.args, **named: P.kwargs) -> T | None:
    """What `ask` returns; None where there is no object. A missing bucket is another matter."""
    try:
        return ask(*values, **named)
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return None
