"""The PromptSet: prompts with their conditioning, in shards on a local folder, read at random and bit for bit.

{split}-00000.jsonl         a record a line: {"prompt": text, ...what the source says about it}
{split}-00000.safetensors   each key of Item: all prompts' tensors one after another along their first dimension;
                            <key>.offsets, int64 (n + 1): where each begins; records.offsets: in the jsonl, in bytes
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

    All items have the same keys; under one key, all tensors have one dtype and one shape but for the first dimension.
    """
    assert len(records) == len(items) > 0
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n" for record in records]
    tensors = {RECORDS + OFFSETS: _offsets([len(line) for line in lines])}
    for key in items[0]:
        parts = [item[key].cpu() for item in items]
        assert len({part.dtype for part in parts}) == 1, f"{key} has several dtypes"  # cat would promote them
        tensors[key] = torch.cat(parts)
        tensors[key + OFFSETS] = _offsets([len(part) for part in parts])
    (folder / f"{split}-{number:05d}.jsonl").write_bytes(b"".join(lines))
    save_file(tensors, folder / f"{split}-{number:05d}.safetensors")


def write_unconditional(folder: Path, item: Item) -> None:
    """Write the Item of the empty prompt."""
    save_file({key: tensor.cpu().contiguous() for key, tensor in item.items()}, folder / UNCONDITIONAL)


class PromptSet:
    """One split of a PromptSet folder. Holds no tensors; each call reads the slices that it needs.

    Raises:
        DataError: a shard is missing or broken.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder, self.split = folder, split
        shards = len(list(folder.glob(f"{split}-*.safetensors")))
        if shards == 0:
            raise DataError(f"{folder} has no {split} prompts; is it the result of the stage prompts?")
        counts = [0]
        for number in range(shards):
            with self._open(number) as tensors:
                counts.append(tensors.get_slice(RECORDS + OFFSETS).get_shape()[0] - 1)
        self._starts = list(itertools.accumulate(counts))  # of each shard, and the end of the last

    def __len__(self) -> int:
        return self._starts[-1]

    def spread(self, limit: int) -> list[int]:
        """At most `limit` indices, evenly spaced and ascending."""
        wanted = min(len(self), limit)
        return [place * len(self) // wanted for place in range(wanted)]

    def records(self, indices: Sequence[int]) -> list[PromptRecord]:
        """The records at `indices`, in their order."""
        found: dict[int, PromptRecord] = {}
        for number, wanted in self._by_shard(indices).items():
            with self._open(number) as tensors, (self.folder / f"{self._name(number)}.jsonl").open("rb") as lines:
                offsets = tensors.get_slice(RECORDS + OFFSETS)
                for index, row in wanted:
                    start, end = offsets[row : row + 2].tolist()
                    lines.seek(start)
                    found[index] = json.loads(lines.read(end - start))
        return [found[index] for index in indices]

    def items(self, indices: Sequence[int]) -> list[Item]:
        """The items at `indices`, in their order."""
        found: dict[int, Item] = {}
        for number, wanted in self._by_shard(indices).items():
            with self._open(number) as tensors:
                names = set(tensors.keys())
                keys = sorted(name for name in names if name + OFFSETS in names)
                for index, row in wanted:
                    found[index] = {key: _slice_row(tensors, key, row) for key in keys}
        return [found[index] for index in indices]

    @staticmethod
    def unconditional(folder: Path) -> Item:
        """The Item of the empty prompt."""
        try:
            return load_file(folder / UNCONDITIONAL)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / UNCONDITIONAL} does not read: {error}; run the stage prompts again") from error

    def _name(self, number: int) -> str:
        return f"{self.split}-{number:05d}"

    def _open(self, number: int) -> safe_open:
        path = self.folder / f"{self._name(number)}.safetensors"
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} does not read: {error}; run the stage prompts again") from error

    def _by_shard(self, indices: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """shard -> (index, row in the shard)."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"prompt {index} of {len(self)}")
            number = bisect.bisect_right(self._starts, index) - 1
            wanted.setdefault(number, []).append((index, index - self._starts[number]))
        return wanted


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


def _slice_row(tensors: safe_open, key: str, row: int) -> torch.Tensor:
    start, end = tensors.get_slice(key + OFFSETS)[row : row + 2].tolist()
    return tensors.get_slice(key)[start:end]
