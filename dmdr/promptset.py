"""The PromptSet: prompts and their conditioning, in shards in a local folder, with random access, bit for bit.

{split}-00000.jsonl         one record in each line: {"prompt": text, ...what the source says about it}
{split}-00000.safetensors   for each key of Item, the tensors of all n prompts, concatenated along the first dimension;
                            <key>.offsets, int64 (n + 1): where each prompt's tensor begins, and the end;
                            records.offsets, int64 (n + 1): where each record begins in the jsonl, in bytes
unconditional.safetensors   the Item of the empty prompt
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dmdr.backbones.protocol import Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError

Split = Literal["train", "evaluation"]
RECORDS, OFFSETS, UNCONDITIONAL = "records", ".offsets", "unconditional.safetensors"


def write_shard(folder: Path, split: Split, number: int, records: list[PromptRecord], items: list[Item]) -> None:
    """Write one shard of n records and their n items.

    All items have the same keys. The tensors of one key have the same dtype, and the same shape but for the first
    dimension.
    """
    assert len(records) == len(items) > 0
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n" for record in records]
    tensors = {RECORDS + OFFSETS: _offsets([len(line) for line in lines])}
    for key in items[0]:
        parts = [item[key].cpu() for item in items]
        assert len({part.dtype for part in parts}) == 1, (
            f"{key} has several dtypes"
        )  # torch.cat would convert them to one
        tensors[key] = torch.cat(parts)
        tensors[key + OFFSETS] = _offsets([len(part) for part in parts])
    (folder / f"{split}-{number:05d}.jsonl").write_bytes(b"".join(lines))
    save_file(tensors, folder / f"{split}-{number:05d}.safetensors")


def write_unconditional(folder: Path, item: Item) -> None:
    """Write the Item of the empty prompt."""
    save_file({key: tensor.cpu().contiguous() for key, tensor in item.items()}, folder / UNCONDITIONAL)


class PromptSet:
    """One split of a PromptSet folder. It holds no tensors: each call reads only what it needs.

    Raises:
        DataError: a shard is missing or broken.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder, self.split = folder, split
        shards = len(list(folder.glob(f"{split}-*.safetensors")))
        if shards == 0:
            raise DataError(f"{folder} has no {split} prompts; give the result of the stage prompts")
        counts = [0]
        for number in range(shards):
            with self._open(number) as tensors:
                counts.append(tensors.get_slice(RECORDS + OFFSETS).get_shape()[0] - 1)
        self._starts = list(itertools.accumulate(counts))  # index of the first prompt of each shard, and the total

    def __len__(self) -> int:
        return self._starts[-1]

    def spread(self, limit: int) -> list[int]:
        """At most `limit` indices, evenly spaced and ascending."""
        return spread_evenly(len(self), limit)

    def records(self, indices: Sequence[int]) -> list[PromptRecord]:
        """Read the records at `indices`, in this order."""
        records: dict[int, PromptRecord] = {}
        for number, places in self._by_shard(indices).items():
            with self._open(number) as tensors, (self.folder / f"{self._name(number)}.jsonl").open("rb") as lines:
                offsets = tensors.get_slice(RECORDS + OFFSETS)
                for index, row in places:
                    start, end = offsets[row : row + 2].tolist()
                    lines.seek(start)
                    records[index] = json.loads(lines.read(end - start))
        return [records[index] for index in indices]

    def items(self, indices: Sequence[int]) -> list[Item]:
        """Read the items at `indices`, in this order."""
        items: dict[int, Item] = {}
        for number, places in self._by_shard(indices).items():
            with self._open(number) as tensors:
                names = set(tensors.keys())
                keys = sorted(name for name in names if name + OFFSETS in names)
                for index, row in places:
                    items[index] = {key: _read_row(tensors, key, row) for key in keys}
        return [items[index] for index in indices]

    @staticmethod
    def unconditional(folder: Path) -> Item:
        """Read the Item of the empty prompt.

        Raises:
            DataError: its file is missing or broken.
        """
        try:
            return load_file(folder / UNCONDITIONAL)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / UNCONDITIONAL} cannot be read: {error}; run the stage prompts again") from error

    def _name(self, number: int) -> str:
        return f"{self.split}-{number:05d}"

    def _open(self, number: int) -> safe_open:
        path = self.folder / f"{self._name(number)}.safetensors"
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}; run the stage prompts again") from error

    def _by_shard(self, indices: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """Group indices by shard: number of the shard -> [(index, row in the shard), ...]."""
        places: dict[int, list[tuple[int, int]]] = {}
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"there is no prompt {index}; there are {len(self)}, counted from 0")
            number = bisect.bisect_right(self._starts, index) - 1
            places.setdefault(number, []).append((index, index - self._starts[number]))
        return places


def _offsets(lengths: list[int]) -> torch.Tensor:
    """Where each of n parts begins, and the end: (n + 1,) int64."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


def _read_row(tensors: safe_open, key: str, row: int) -> torch.Tensor:
    start, end = tensors.get_slice(key + OFFSETS)[row : row + 2].tolist()
    return tensors.get_slice(key)[start:end]


def spread_evenly(total: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `total`, evenly spaced and ascending."""
    count = min(total, limit)
    return [position * total // count for position in range(count)]
