"""A folder as an artifact store. A file appears only when it is complete, even if its writer is killed.

A file is written in the attempt's own `.attempt-*` folder, flushed to the disk and renamed into place. The attempt
holds a lock on that folder. The lock ends with the process, so an `.attempt-*` folder without a lock is left over from
a killed attempt. `locks.py` says how long a lock is waited for.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmdr.errors import DataError, InputMissing, StoreError
from stages.store import locks

ATTEMPT = ".attempt-"
NOTE = "holds-the-lock.json"  # in the folder of the attempt that is `alone`
LARGEST_DOCUMENT = 64 * 2**20  # bytes
UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(UMASK)


@contextmanager
def translate_errors(action: str, where: object) -> Iterator[None]:
    """Turn an error of the operating system into one line for the user."""
    try:
        yield
    except (StoreError, InputMissing):
        raise
    except OSError as error:
        raise StoreError(
            f"cannot {action} {where}: {error.strerror or error}; make sure that the store is writable and has free "
            "space, or choose another with --store, then repeat the command"
        ) from error


class Folder:
    """The files of one address. Names are relative, with slashes. Every method raises StoreError.

    A link inside of the address that leads out of it is not followed, but refused with DataError.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lock: int | None = None  # a file handle, open as long as this object exists

    def read(self, name: str) -> bytes | None:
        """The bytes of a document; None if there is none. Anything but a file, or a larger one, is refused."""
        path = self._locate(name)
        with translate_errors("read", path):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would make us wait for its other end
            except FileNotFoundError:
                return None
            with open(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise OSError("it is no file")
                data = file.read(LARGEST_DOCUMENT + 1)
        refuse_large(data, path)
        return data

    def create(self, name: str, data: bytes) -> bytes:
        """Write a file unless there is one already; returns the content that the file has now."""
        target = self._locate(name)
        with translate_errors("write", target):
            temporary = self._write_temporary(lambda file: file.write_bytes(data))
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, target)  # unlike a rename, it never replaces
            except FileExistsError:
                return target.read_bytes()
            finally:
                temporary.unlink()
            _flush(target.parent)
        return data

    def publish(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a new file, then put it in place of the old one."""
        target = self._locate(name)
        with translate_errors("write", target):
            self._place(self._write_temporary(write), target)

    def add(self, name: str, source: Path, digest: str) -> str:
        """Move a file into the store, and return the name under which it is stored. Call it inside `alone()`."""
        self.publish(name, lambda file: shutil.move(source, file))
        return name

    def fetch(self, name: str, target: Path) -> Path | None:
        """The file's path in the store (nothing is copied to `target`); None if there is no file."""
        path = self._locate(name)
        return path if path.is_file() else None

    def read_range(self, name: str, start: int, end: int) -> bytes | None:
        """The bytes from `start` on and before `end`; fewer if the file ends earlier. None if there is no file."""
        path = self._locate(name)
        with translate_errors("read", path):
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    return file.read(end - start)
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        with translate_errors("list", self.root):
            names: list[str] = []
            for folder, below, files in os.walk(self.root):
                below[:] = [each for each in below if not each.startswith(ATTEMPT)]
                names += [(Path(folder) / name).relative_to(self.root).as_posix() for name in files]
            return sorted(names)

    def folders(self) -> list[str]:
        """The names of the folders directly below; empty if the address does not exist yet."""
        with translate_errors("list", self.root):
            try:
                return sorted(path.name for path in self.root.iterdir() if path.is_dir())
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        """Delete a file, a link, or a folder with all that is in it, if it exists."""
        target = self._locate(name)
        with translate_errors("delete", target):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def remove_empty(self, name: str) -> None:
        """Delete a folder, and those below it, as far as no file is in them."""
        top = self._locate(name)
        with translate_errors("delete", top):
            for folder, _, _ in os.walk(top, topdown=False):
                if not os.listdir(folder):
                    os.rmdir(folder)

    def scratch(self) -> Path:
        """A folder of this attempt on the store's own disk, deleted when the process ends."""
        with translate_errors("write in", self.root):
            while self._scratch is None:
                self.root.mkdir(parents=True, exist_ok=True)
                folder = tempfile.TemporaryDirectory(prefix=ATTEMPT, dir=self.root, ignore_cleanup_errors=True)
                try:
                    self._lock = os.open(folder.name, os.O_RDONLY)
                except FileNotFoundError:  # another attempt's tidy() came first
                    continue
                weakref.finalize(self, os.close, self._lock)
                # else another attempt's tidy() came first, and deletes it or was stopped while it did
                if locks.try_lock(self._lock) and Path(folder.name).exists():
                    self._scratch = folder
            return Path(self._scratch.name)

    def tidy(self) -> None:
        """Delete the folders of killed attempts."""
        with translate_errors("delete in", self.root):
            for folder in self.root.glob(f"{ATTEMPT}*"):
                with suppress(FileNotFoundError):  # its attempt ended, or another process deleted it
                    _delete_unless_locked(folder)

    def end_uploads(self) -> None:
        """Do nothing, because what a killed attempt has left lies in its folder."""

    def is_busy(self) -> bool:
        """Whether another attempt of this address still runs. Call `tidy` before."""
        own = None if self._scratch is None else Path(self._scratch.name)
        with translate_errors("list", self.root):
            return any(folder != own for folder in self.root.glob(f"{ATTEMPT}*"))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the address, so that only one process at a time is inside the `with` block."""
        doing, note = f"writes to {self.root}", self.scratch() / NOTE
        with translate_errors("lock", self.root):
            handle = os.open(self.root, os.O_RDONLY)
        try:
            with translate_errors("lock", self.root):
                locks.wait_for(handle, doing, self._read_owner)
            with locks.announce(note, doing):
                yield
        finally:
            os.close(handle)

    def _read_owner(self) -> locks.Owner | None:
        """The attempt that says that it is `alone`."""
        for folder in self.root.glob(f"{ATTEMPT}*"):
            with suppress(OSError):  # its attempt ended
                owner = locks.parse_present((folder / NOTE).read_bytes())
                if owner is not None and _is_locked(folder):
                    return owner
        return None

    def _write_temporary(self, write: Callable[[Path], object]) -> Path:
        """Write a new file in the scratch folder and flush it to the disk. All who may read the store may read it."""
        handle, name = tempfile.mkstemp(dir=self.scratch())
        os.close(handle)
        try:
            write(Path(name))
            os.chmod(name, 0o666 & ~UMASK)  # mkstemp and safetensors make files that only their owner can read
            _flush(Path(name))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)

    def _locate(self, name: str) -> Path:
        """The path of a name. Raises DataError if a link in it leads out of the address."""
        path = self.root / name
        if name and not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise DataError(f"{path.parent} leads out of {self.root} by a link; delete it, and do not trust this store")
        return path

    def _place(self, temporary: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
        _flush(target.parent)


def open_local_folder() -> Folder:
    """A folder of this machine for the attempts whose store is elsewhere. What killed ones have left there is deleted.

    Raises:
        StoreError: it cannot be written, or is another user's.
    """
    root = Path(tempfile.gettempdir(), f"dmdr-{os.getuid()}")
    with translate_errors("write in", root):
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise OSError("it is another user's; set TMPDIR to a folder of your own")
    folder = Folder(root)
    folder.tidy()
    return folder


def refuse_large(data: bytes, where: object) -> None:
    """Raises DataError for a document that is larger than any of ours."""
    if len(data) > LARGEST_DOCUMENT:
        raise DataError(f"{where} is larger than {LARGEST_DOCUMENT // 2**20} MiB, so DMDR did not write it; delete it")


def _delete_unless_locked(folder: Path) -> None:
    """Delete the folder of an attempt, unless the attempt still runs."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if locks.try_lock(handle):
            shutil.rmtree(folder)
    finally:
        os.close(handle)


def _is_locked(folder: Path) -> bool:
    """Whether the attempt of this folder still runs."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        return not locks.try_lock(handle)
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
