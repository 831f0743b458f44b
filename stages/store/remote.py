"""An artifact store on S3, or on any other fsspec filesystem but the local one. Only this file imports fsspec.

These stores show an object only when it is complete. `create` and `add` never overwrite an object. Listings are never
cached, because another process may have written an object since.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import fsspec
from fsspec.core import strip_protocol

from dmdr.errors import ConfigError, InputMissing, StoreError
from stages.store import conditional_writes, transfer
from stages.store.folder import LARGEST_DOCUMENT, Folder, open_local_folder, refuse_large
from stages.store.listing import list_names
from stages.store.records import DIGITS
from stages.store.s3_errors import build_error, error_code, is_expired, is_taken, retry
from stages.store.s3_requests import S3Answer
from stages.store.traffic import TRAFFIC

P = ParamSpec("P")
T = TypeVar("T")

S3 = {
    "max_concurrency": 1,  # transfer.py sends requests in parallel
    "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 60},  # seconds
}
UPLOADS = 3  # how often a file is sent whose upload somebody deletes


def _read_settings() -> frozenset[tuple[str, str]]:
    """What the environment tells a client of S3."""
    return frozenset(
        (name, value)
        for name, value in os.environ.items()
        if name == "HOME" or name.startswith("AWS_") or name.lower().endswith("_proxy")
    )


@lru_cache(maxsize=4)
def _open_s3(process: int, settings: frozenset[tuple[str, str]]) -> fsspec.AbstractFileSystem:
    """The filesystem that all addresses on S3 share, because a client for each would cost a quarter of a second.

    process, settings: a forked process and another environment have a client of their own.
    """
    fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True, **S3)
    fs.retries = 1  # s3_errors.py repeats failed requests
    return fs


class Remote:
    """The objects of one address on any fsspec filesystem but the local one; the same methods as Folder."""

    def __init__(self, url: str) -> None:
        self.is_s3 = url.startswith("s3://")
        try:
            if self.is_s3:
                self.fs = _open_s3(os.getpid(), _read_settings())
                self.root = strip_protocol(url)
            else:  # a cached listing would hide what another process wrote
                self.fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"store {url}: {error}; give a folder or s3://BUCKET/PREFIX") from error
        self.url = url
        self._local: Folder | None = None

    @contextmanager
    def _translate_errors(self, action: str, name: str = "") -> Iterator[None]:
        """Turn any error of a client library into one line for the user."""
        try:
            yield
        except (StoreError, ConfigError, InputMissing):
            raise
        except Exception as error:
            raise build_error(error, action, f"{self.url}/{name}") from error

    def _with_renewal(self, request: Callable[P, T]) -> Callable[P, T]:
        """Wrap a request so that it is repeated once with new credentials if ours have expired.

        Credentials that come from files or identities are renewed that way.
        """

        def send(*values: P.args, **named: P.kwargs) -> T:
            try:
                return request(*values, **named)
            except Exception as error:
                if not is_expired(error):
                    raise
            self.fs.connect(refresh=True)
            return request(*values, **named)

        return send

    def _retry(self, request: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
        return retry(self._with_renewal(request), *values, **named)

    def _call(self, operation: str, **parameters: object) -> S3Answer:
        """Send a request to S3. operation: its name in the S3 client."""
        answer: S3Answer = self._with_renewal(self.fs.call_s3)(operation, **parameters)
        return answer

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        with self._translate_errors("read", name):
            data = _unless_missing(self._reader(self._path(name)), 0, LARGEST_DOCUMENT + 1)
        if data is not None:
            refuse_large(data, f"{self.url}/{name}")
        return data

    def create(self, name: str, data: bytes) -> bytes:
        with self._translate_errors("write", name):
            if conditional_writes.is_ignored():
                return self._create_unconditionally(name, data)
            self._ensure_conditions()
            try:
                self._retry(self.fs.pipe_file, self._path(name), data, mode="create")
            except Exception as error:
                # Another process wrote it, or this one did and the answer got lost. Return the content that is there.
                if not is_taken(error) or (present := self.read(name)) is None:
                    raise
                return present
        TRAFFIC.count(written=len(data))
        return data

    def _create_unconditionally(self, name: str, data: bytes) -> bytes:
        present = self.read(name)
        if present is not None:
            return present
        self._retry(self.fs.pipe_file, self._path(name), data)
        written = self.read(name)
        if written is None:
            raise FileNotFoundError("it disappeared right after it was written")
        return written

    def _ensure_conditions(self) -> None:
        path = (
            f"{self.root.rpartition('/')[0]}/probe-{uuid.uuid4().hex}"  # above the address, where no stage deletes it
        )
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"?")
            file.flush()
            writes = [lambda: self._with_renewal(self.fs.pipe_file)(path, b"?", mode="create")] * 2
            if self.is_s3:  # some stores honour the condition only on plain writes
                writes.append(lambda: self._upload(path, Path(file.name), create=True))
            store = "/".join(self.url.split("/")[:3])
            conditional_writes.ensure_honoured(store, writes, lambda: self._delete(path))

    def publish(self, name: str, write: Callable[[Path], object]) -> None:
        with self._translate_errors("write", name), tempfile.NamedTemporaryFile(dir=self.scratch()) as file:
            write(Path(file.name))
            self._put(self._path(name), Path(file.name), create=False)

    def add(self, name: str, source: Path, digest: str) -> str:
        second_name = f"{name}~{digest[:DIGITS]}"
        with self._translate_errors("write", name):
            if conditional_writes.is_ignored():
                self._put(self._path(second_name), source, create=False)
                return second_name
            for stored in (name, second_name):
                try:
                    self._put(self._path(stored), source, create=True)
                    return stored
                except Exception as error:
                    if not is_taken(error):
                        raise
                    if self._holds(self._path(stored), source):
                        return stored
            raise FileExistsError(f"it and {second_name} exist with other contents; delete both")

    def _put(self, path: str, source: Path, *, create: bool) -> None:
        size = source.stat().st_size
        TRAFFIC.count(written=size)
        if not self.is_s3 or size < 2 * transfer.PART:
            mode = "create" if create else "overwrite"
            self._retry(self.fs.put_file, str(source), path, mode=mode)
            return
        self._upload_whole(path, source, create=create)
        stored = self._size(path)
        if stored != size:
            raise OSError(f"it has {stored} bytes, but {size} were sent")

    def _upload_whole(self, path: str, source: Path, *, create: bool) -> None:
        """Upload a file. Where the store says that there is no such upload, the file is there, or it is sent again.

        It is there if the upload succeeded and its answer got lost. It is not if a copy of the stage that took over
        deleted the upload.
        """
        for _ in range(UPLOADS):
            try:
                return self._upload(path, source, create=create)
            except FileNotFoundError as error:
                last = error
                if error_code(error) != "NoSuchUpload":
                    raise
                if self._holds(path, source):
                    return None
        raise last

    def _upload(self, path: str, source: Path, *, create: bool) -> None:
        bucket, key, _ = self.fs.split_path(path)
        transfer.upload(self._call, bucket, key, source, create=create)

    def _holds(self, path: str, source: Path) -> bool:
        return bool(_unless_missing(transfer.is_same, self._reader(path), partial(self._size, path), source))

    def _size(self, path: str) -> int:
        return self._retry(self.fs.size, path)

    def _reader(self, path: str) -> transfer.Read:
        def read(start: int, end: int) -> bytes:
            try:
                data = self._retry(self.fs.cat_file, path, start=start, end=end)
                TRAFFIC.count(read=len(data))
                return data
            except OSError as error:
                if error_code(error) == "InvalidRange":  # the object ends before this range
                    return b""
                raise

        return read

    def fetch(self, name: str, target: Path) -> Path | None:
        path = self._path(name)
        with self._translate_errors("read", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            return _unless_missing(transfer.download, self._reader(path), partial(self._size, path), target)

    def read_range(self, name: str, start: int, end: int) -> bytes | None:
        with self._translate_errors("read", name):
            return _unless_missing(self._reader(self._path(name)), start, end)

    def names(self) -> list[str]:
        with self._translate_errors("list"):
            return sorted(path.removeprefix(f"{self.root}/") for path in self._list_below(self.root))

    def folders(self) -> list[str]:
        with self._translate_errors("list"):
            if self.is_s3:
                bucket, key, _ = self.fs.split_path(self.root)
                paths = list_names(self._call, bucket, f"{key}/" if key else "", folders=True)
            else:
                entries: list[dict[str, str]] = _unless_missing(self._retry, self.fs.ls, self.root, detail=True) or []
                paths = [each["name"] for each in entries if each["type"] == "directory"]
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def remove(self, name: str) -> None:
        """Delete object by object, because s3fs does not report which of many objects the store failed to delete."""
        with self._translate_errors("delete", name):
            transfer.map_in_parallel(self._delete, self._list_below(self._path(name)))

    def remove_empty(self, name: str) -> None:
        """Do nothing, because here a folder is no more than the beginning of names."""

    def _list_below(self, path: str) -> list[str]:
        """The paths of the object at `path`, if there is one, and of all objects below it."""
        if not self.is_s3:
            return self._retry(self.fs.find, path)
        bucket, key, _ = self.fs.split_path(path)
        names = list_names(self._call, bucket, key)
        return [f"{bucket}/{each}" for each in names if each == key or each.startswith(f"{key}/")]

    def _delete(self, path: str) -> None:
        _unless_missing(self._retry, self.fs.rm_file, path)

    def scratch(self) -> Path:
        if self._local is None:
            self._local = open_local_folder()
        return self._local.scratch()

    def tidy(self) -> None:
        """Do nothing, because an interrupted upload is not visible."""

    def end_uploads(self) -> None:
        """Delete the parts that uploads of killed attempts have left. An upload of another live copy starts again."""
        if not self.is_s3:
            return
        bucket, key, _ = self.fs.split_path(self.root)
        with self._translate_errors("delete"):
            transfer.end_uploads(self._call, bucket, f"{key}/")

    def is_busy(self) -> bool:
        """False, because no lock tells. Who stores something compares the claim first."""
        return False

    def alone(self) -> nullcontext[None]:
        """Lock nothing, because no object is ever overwritten."""
        return nullcontext()


def _unless_missing(request: Callable[P, T], *values: P.args, **named: P.kwargs) -> T | None:
    """The result of `request`; None if the object does not exist. A missing bucket is an error."""
    try:
        return request(*values, **named)
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return None
