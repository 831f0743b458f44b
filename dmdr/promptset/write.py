"""Write the shards of a PromptSet. In the layout of rows, no more than one batch of items is in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from dmdr.backbones.protocol import Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.promptset.layout import (
    ITEM_DIGESTS,
    ITEM_OFFSETS,
    OFFSETS,
    RECORDS,
    UNCONDITIONAL,
    Layout,
    Split,
    name_shard,
)


def write_shard(
    folder: Path,
    split: Split,
    number: int,
    records: list[PromptRecord],
    items: Iterable[Item],
    *,
    layout: Layout = "joined",
) -> None:
    """Write one shard of n records and their n items; in the layout text, without looking at the items.

    All items have the same keys. The tensors of one key have the same dtype, and the same shape but for the first
    dimension.
    """
    assert len(records) > 0
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n" for record in records]
    begin = folder / name_shard(split, number)
    begin.with_suffix(".jsonl").write_bytes(b"".join(lines))
    if layout == "rows":
        written = _write_rows(begin, items)
    elif layout == "joined":
        written = _write_joined(begin, list(items), lines)
    else:
        return
    assert written == len(records), f"{written} items of {len(records)} records"


def write_unconditional(folder: Path, item: Item) -> None:
    """Write the Item of the empty prompt."""
    save_file({key: tensor.cpu().contiguous() for key, tensor in item.items()}, folder / UNCONDITIONAL)


def _write_joined(begin: Path, items: list[Item], lines: list[bytes]) -> int:
    tensors = {RECORDS + OFFSETS: _sum_up([len(line) for line in lines])}
    for key in items[0]:
        parts = [item[key].cpu() for item in items]
        assert len({part.dtype for part in parts}) == 1, (
            f"{key} has several dtypes"
        )  # torch.cat would convert them to one
        tensors[key] = torch.cat(parts)
        tensors[key + OFFSETS] = _sum_up([len(part) for part in parts])
    save_file(tensors, begin.with_suffix(".safetensors"))
    return len(items)


def _write_rows(begin: Path, items: Iterable[Item]) -> int:
    lengths, digests = [], []
    with begin.with_suffix(".items").open("wb") as file:
        for item in items:
            data = save({key: tensor.cpu().contiguous() for key, tensor in item.items()})
            file.write(data)
            lengths.append(len(data))
            digests.append(list(hashlib.sha256(data).digest()))
    index = {ITEM_OFFSETS: _sum_up(lengths), ITEM_DIGESTS: torch.tensor(digests, dtype=torch.uint8)}
    save_file(index, begin.with_suffix(".index.safetensors"))
    return len(lengths)


def _sum_up(lengths: list[int]) -> torch.Tensor:
    """Where each of n parts begins, and the end: (n + 1,) int64."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)
