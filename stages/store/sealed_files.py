"""The files of a sealed artifact, fetched when they are needed. Only so many of them are kept on this machine.

1. A whole file is verified against the record, a block of a file against a digest that the caller has from a verified
   file. What arrives wrong is asked for again before it is an error.
2. Files of a store in a folder are read where they lie.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from dmdr.errors import DataError
from dmdr.promptset.files import Block
from stages.store.artifacts import Artifact
from stages.store.folder import Folder
from stages.store.intact import TRIES, Damaged, fetch_intact
from stages.store.transfer import map_in_parallel


class SealedFiles:
    """The files of one artifact. Only one thread at a time may use them.

    Args:
        cache: where copies of a remote store's files go.
        limit: bytes that the copies may take; the newest one stays even if it is larger.

    Raises:
        InputMissing: the artifact is not sealed.
    """

    def __init__(self, artifact: Artifact, cache: Path, limit: int) -> None:
        self.record = artifact.sealed()
        self._artifact, self._cache, self._limit = artifact, cache, limit
        self._is_local = isinstance(artifact.place, Folder)
        self._kept: OrderedDict[Path, int] = OrderedDict()  # copies and their bytes, the one used last at the end
        self._size = 0  # of all copies, in bytes
        self._verified: dict[str, Path] = {}  # files of a local store

    def __str__(self) -> str:
        return self._artifact.address

    @property
    def is_local(self) -> bool:
        """Whether the files lie in a folder of this machine."""
        return self._is_local

    def names(self) -> list[str]:
        return sorted(self.record.files)

    def count_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.record.files.values())

    def fetch(self, name: str) -> Path:
        """A local path of a whole file, verified. A copy is there at least until the next call.

        Raises:
            DataError: it is missing or damaged.
        """
        copy = self._cache / name
        if name in self._verified:
            return self._verified[name]
        if copy in self._kept:
            self._kept.move_to_end(copy)
            return copy
        expected = self.record.files.get(name)
        if expected is None:
            raise self._describe(name, "is missing: the record does not list it")
        try:
            path = fetch_intact(self._artifact.place, expected.stored_as or name, copy, expected)
        except Damaged as error:
            raise self._describe(name, str(error)) from error
        if self._is_local:
            self._verified[name] = path
        else:
            self._keep(copy, expected.size)
        return path

    def read(self, blocks: Sequence[Block]) -> list[bytes]:
        """The bytes of each block, verified. Blocks that are not kept here are asked for in parallel.

        Raises:
            DataError: a file is missing, or a block is damaged.
        """
        found = {block: data for block in blocks if (data := self._read_copy(block)) is not None}
        missing = [block for block in dict.fromkeys(blocks) if block not in found]
        for block, data in zip(missing, map_in_parallel(self._ask_for, missing) if missing else [], strict=True):
            found[block] = data
            if not self._is_local:
                self._write_copy(block, data)
        return [found[block] for block in blocks]

    def _ask_for(self, block: Block) -> bytes:
        expected = self.record.files.get(block.name)
        stored = block.name if expected is None else expected.stored_as or block.name
        for _ in range(TRIES):
            data = self._artifact.place.read_range(stored, block.start, block.end)
            if data is None:
                raise self._describe(block.name, "is missing")
            if block.is_intact(data):
                return data
            if self._is_local:
                break
        raise self._describe(
            block.name, f"is damaged from byte {block.start:,} on: its sha256 is not the one in its index"
        )

    def _name_copy(self, block: Block) -> Path:
        return self._cache / "blocks" / f"{block.name}-{block.start}"

    def _read_copy(self, block: Block) -> bytes | None:
        copy = self._name_copy(block)
        if copy not in self._kept:
            return None
        self._kept.move_to_end(copy)
        return copy.read_bytes()

    def _write_copy(self, block: Block, data: bytes) -> None:
        copy = self._name_copy(block)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
        self._keep(copy, len(data))

    def _keep(self, copy: Path, size: int) -> None:
        """Note a new copy, and delete those that were not used for the longest time."""
        self._kept[copy] = size
        self._size += size
        while len(self._kept) > 1 and self._size > self._limit:
            oldest, freed = self._kept.popitem(last=False)
            oldest.unlink()
            self._size -= freed

    def _describe(self, name: str, what: str) -> DataError:
        address = self._artifact.address
        return DataError(f"{address}/{name} {what}; delete {address} and run {self._artifact.stage} again")
