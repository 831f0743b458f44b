"""Read prompts and items of a PromptSet at random, in any layout. `layout.py` describes the files."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file

from dmdr.backbones.protocol import Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError
from dmdr.promptset.files import Block, Files, LocalFiles
from dmdr.promptset.layout import (
    ITEM_DIGESTS,
    ITEM_OFFSETS,
    OFFSETS,
    RECORDS,
    UNCONDITIONAL,
    Split,
    find_layout,
    name_shard,
    spread_evenly,
)


class PromptSet:
    """One split of a PromptSet. It holds no tensors: each call reads only what it needs.

    Args:
        files: a folder, or files that lie elsewhere.
        sizes: the number of prompts in each shard, if the caller knows it; None: every shard is opened to find it out.

    Raises:
        DataError: a shard is missing or broken.
    """

    def __init__(self, files: Path | Files, split: Split, *, sizes: Sequence[int] | None = None) -> None:
        self.files: Files = LocalFiles(files) if isinstance(files, Path) else files
        self.split: Split = split
        names = self.files.names()
        self.layout = find_layout(names)
        shards = sum(name.startswith(f"{split}-") and name.endswith(".jsonl") for name in names)
        if shards == 0:
            raise DataError(f"{self.files} has no {split} prompts; give the result of the stage prompts")
        self.sizes = [self._count(number) for number in range(shards)] if sizes is None else list(sizes)
        self._starts = [0, *itertools.accumulate(self.sizes)]  # index of the first prompt of each shard, and the total

    def __len__(self) -> int:
        return self._starts[-1]

    def spread(self, limit: int) -> list[int]:
        """At most `limit` indices, evenly spaced and ascending."""
        return spread_evenly(len(self), limit)

    def records(self, indices: Sequence[int]) -> list[PromptRecord]:
        """Read the records at `indices`, in this order."""
        records: dict[int, PromptRecord] = {}
        for number, places in self._by_shard(indices).items():
            if self.layout == "joined":
                records |= self._read_lines_at_offsets(number, places)
                continue
            lines = self.files.fetch(f"{name_shard(self.split, number)}.jsonl").read_bytes().split(b"\n")
            records |= {index: json.loads(lines[row]) for index, row in places}
        return [records[index] for index in indices]

    def items(self, indices: Sequence[int]) -> list[Item]:
        """Read the items at `indices`, in this order. The set must have items: its layout is not text."""
        assert self.layout != "text", "its prompts are not encoded"
        items: dict[int, Item] = {}
        blocks: dict[int, Block] = {}
        for number, places in self._by_shard(indices).items():
            if self.layout == "rows":
                blocks |= self._find_blocks(number, places)
                continue
            with self._open(number) as tensors:
                names = set(tensors.keys())
                keys = sorted(name for name in names if name + OFFSETS in names)
                for index, row in places:
                    items[index] = {key: _read_row(tensors, key, row) for key in keys}
        items |= zip(blocks, map(load, self.files.read(list(blocks.values()))), strict=True)
        return [items[index] for index in indices]

    @staticmethod
    def unconditional(files: Path | Files) -> Item:
        """Read the Item of the empty prompt.

        Raises:
            DataError: its file is missing or broken.
        """
        return _load((LocalFiles(files) if isinstance(files, Path) else files).fetch(UNCONDITIONAL))

    def _count(self, number: int) -> int:
        """The number of prompts in a shard."""
        name = name_shard(self.split, number)
        if self.layout == "joined":
            with self._open(number) as tensors:
                return int(tensors.get_slice(RECORDS + OFFSETS).get_shape()[0]) - 1
        return self.files.fetch(f"{name}.jsonl").read_bytes().count(b"\n")

    def _read_lines_at_offsets(self, number: int, places: list[tuple[int, int]]) -> dict[int, PromptRecord]:
        with self._open(number) as tensors:
            offsets = tensors.get_tensor(RECORDS + OFFSETS)
        records: dict[int, PromptRecord] = {}
        with self.files.fetch(f"{name_shard(self.split, number)}.jsonl").open("rb") as lines:
            for index, row in places:
                start, end = offsets[row : row + 2].tolist()
                lines.seek(start)
                records[index] = json.loads(lines.read(end - start))
        return records

    def _find_blocks(self, number: int, places: list[tuple[int, int]]) -> dict[int, Block]:
        """Where the items of a shard lie: index of a prompt -> its block."""
        name = name_shard(self.split, number)
        found = _load(self.files.fetch(f"{name}.index.safetensors"))
        offsets, digests = found[ITEM_OFFSETS], found[ITEM_DIGESTS]
        blocks: dict[int, Block] = {}
        for index, row in places:
            start, end = offsets[row : row + 2].tolist()
            blocks[index] = Block(f"{name}.items", start, end, bytes(digests[row].tolist()))
        return blocks

    def _open(self, number: int) -> safe_open:
        path = self.files.fetch(f"{name_shard(self.split, number)}.safetensors")
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}; run the stage prompts again") from error

    def _by_shard(self, indices: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """Group indices by shard: number of the shard -> [(index, row in the shard), ...]."""
        places: dict[int, list[tuple[int, int]]] = {}
        for index in dict.fromkeys(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"there is no prompt {index}; there are {len(self)}, counted from 0")
            number = bisect.bisect_right(self._starts, index) - 1
            places.setdefault(number, []).append((index, index - self._starts[number]))
        return places


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}; run the stage prompts again") from error


def _read_row(tensors: safe_open, key: str, row: int) -> torch.Tensor:
    start, end = tensors.get_slice(key + OFFSETS)[row : row + 2].tolist()
    return tensors.get_slice(key)[start:end]
