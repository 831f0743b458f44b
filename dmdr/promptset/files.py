"""Where a PromptSet takes the bytes of its files from: a local folder, or whatever else has the same three methods."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dmdr.errors import DataError


@dataclass(frozen=True)
class Block:
    """The bytes `start` to `end` - 1 of a file, and the digest by which they are recognised."""

    name: str
    start: int
    end: int
    sha256: bytes

    def is_intact(self, data: bytes | None) -> bool:
        return data is not None and hashlib.sha256(data).digest() == self.sha256


class Files(Protocol):
    """The files of a PromptSet. Only one thread at a time may use them."""

    def names(self) -> list[str]:
        """The names of all files."""

    def fetch(self, name: str) -> Path:
        """A local path of a whole file, verified if there is a digest of it. It is valid until the next call.

        Raises:
            DataError: it is missing or damaged.
        """

    def read(self, blocks: Sequence[Block]) -> list[bytes]:
        """The bytes of each block, verified.

        Raises:
            DataError: a file is missing, or a block is damaged.
        """


class LocalFiles:
    """The files of a folder. Only blocks are verified, because nothing holds the digests of the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def fetch(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; run the stage prompts again")
        return path

    def read(self, blocks: Sequence[Block]) -> list[bytes]:
        return [self._read_block(block) for block in blocks]

    def _read_block(self, block: Block) -> bytes:
        with self.fetch(block.name).open("rb") as file:
            file.seek(block.start)
            data = file.read(block.end - block.start)
        if not block.is_intact(data):
            raise DataError(
                f"{self.folder / block.name} is damaged from byte {block.start:,} on: its sha256 is not the one in its "
                "index; run the stage prompts again"
            )
        return data
