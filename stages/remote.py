"""An artifact store on any fsspec filesystem but the local one, S3 before all; the only file that knows fsspec.

An object is whole or invisible there by itself. None is ever overwritten by `create` and `add`. Listings are never
cached, and what is true is read from the object itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import fsspec

from dmdr.errors import ConfigError, StoreError

S3 = {  # bounded: a store that does not answer is given up after about a minute, and the stage is retried as a whole
    "default_block_size": 32 * 2**20,
    "config_kwargs": {"retries": {"max_attempts": 4, "mode": "standard"}, "connect_timeout": 5, "read_timeout": 60},
}
SHOWN = 12  # hex digits of the digest in the second name of a file


class Remote:
    """The objects of one address on any fsspec filesystem but the local one; the same methods as Folder."""

    def __init__(self, url: str) -> None:
        options = S3 if url.startswith("s3://") else {}
        try:  # a cached listing would hide what another process wrote
            self.fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"store {url}: {error}; give a folder or s3://BUCKET/PREFIX") from error
        self.url = url
        self._scratch: tempfile.TemporaryDirectory | None = None

    @contextmanager
    def _asked(self, action: str, name: str = "") -> Iterator[None]:
        """A remote filesystem raises whatever its client library raises: all of it becomes one line."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            remedy = "see that the store can be reached and written to, then repeat the command"
            if "NoSuchBucket" in f"{error.__cause__}":
                remedy = "create the bucket, or correct --store"
            said = " ".join(f"{error}".split()) or type(error).__name__
            raise StoreError(f"cannot {action} {self.url}/{name}: {said}; {remedy}") from error

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        with self._asked("read", name):
            try:
                return self.fs.cat_file(self._path(name))
            except FileNotFoundError as error:
                if "NoSuchBucket" in f"{error.__cause__}":
                    raise
                return None

    def create(self, name: str, data: bytes) -> bytes:
        with self._asked("write", name):
            try:
                self.fs.pipe_file(self._path(name), data, mode="create")
            except Exception:
                # Refused because it exists, or written while the answer got lost and the retry met our own object:
                # what stands there decides.
                if (found := self.read(name)) is None:
                    raise
                return found
        return data

    def publish(self, name: str, write: Callable[[Path], object]) -> None:
        with self._asked("write", name), tempfile.NamedTemporaryFile(dir=self.scratch()) as file:
            write(Path(file.name))
            self.fs.put_file(file.name, self._path(name))

    def add(self, name: str, source: Path, digest: str) -> str:
        with self._asked("write", name):
            for stored in (name, f"{name}~{digest[:SHOWN]}"):
                try:
                    self.fs.put_file(str(source), self._path(stored), mode="create")
                    return stored
                except OSError as error:  # some servers do not say which condition failed
                    if not (isinstance(error, FileExistsError) or "PreconditionFailed" in f"{error.__cause__}"):
                        raise
            return stored  # somebody stored the same bytes: the digest is in the name, and objects are never half

    def fetch(self, name: str, target: Path) -> Path | None:
        with self._asked("read", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(self._path(name), str(target))
            except FileNotFoundError:
                return None
            return target

    def read_range(self, name: str, start: int, end: int) -> bytes | None:
        with self._asked("read", name):
            try:
                return self.fs.cat_file(self._path(name), start=start, end=end)
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        with self._asked("list"):
            return sorted(path.removeprefix(f"{self.root}/") for path in self.fs.find(self.root))

    def folders(self) -> list[str]:
        with self._asked("list"):
            try:
                found = self.fs.ls(self.root, detail=True)
            except FileNotFoundError as error:
                if "NoSuchBucket" in f"{error.__cause__}":
                    raise
                return []
            return sorted(each["name"].rstrip("/").rsplit("/", 1)[-1] for each in found if each["type"] == "directory")

    def remove(self, name: str) -> None:
        with self._asked("delete", name):
            try:
                self.fs.rm(self._path(name), recursive=True)
            except FileNotFoundError:
                return

    def scratch(self) -> Path:
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="dmdr-", ignore_cleanup_errors=True)
        return Path(self._scratch.name)

    def tidy(self) -> None:
        """Nothing to do: an upload that was cut off is not visible."""

    def alone(self) -> nullcontext:
        """No lock is needed where nothing is overwritten."""
        return nullcontext()
