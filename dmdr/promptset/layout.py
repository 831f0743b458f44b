"""The files of a PromptSet, in one of three layouts. Items and records come back bit for bit.

{split}-00000.jsonl              one record in each line: {"prompt": text, ...what the source says about it}
unconditional.safetensors        the Item of the empty prompt; its dtype is that of all items

joined, which a small set has; a shard is read as a whole:
{split}-00000.safetensors        for each key of Item, the tensors of all n prompts, joined along the first dimension;
                                 <key>.offsets, int64 (n + 1): where each prompt's tensor begins, and the end;
                                 records.offsets, int64 (n + 1): where each record begins in the jsonl, in bytes

rows, which a large set has; each item is read and verified by itself:
{split}-00000.items              n items, one after the other, each as a safetensors file
{split}-00000.index.safetensors  offsets, int64 (n + 1): where each item begins, and the end;
                                 sha256, uint8 (n, 32): of each item's bytes

text has no items: whoever reads the prompts encodes them.

All shards of a split have the same number of prompts, but for the last one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "evaluation"]
Layout = Literal["joined", "rows", "text"]
UNCONDITIONAL = "unconditional.safetensors"
RECORDS, OFFSETS = "records", ".offsets"  # of the joined layout
ITEM_OFFSETS, ITEM_DIGESTS = "offsets", "sha256"  # of the index of rows
ENDINGS: dict[Layout, tuple[str, ...]] = {
    "joined": (".jsonl", ".safetensors"),
    "rows": (".jsonl", ".items", ".index.safetensors"),
    "text": (".jsonl",),
}


def name_shard(split: Split, number: int) -> str:
    """How the names of a shard's files begin."""
    return f"{split}-{number:05d}"


def name_files(layout: Layout, split: Split, number: int) -> list[str]:
    """The names of a shard's files."""
    return [name_shard(split, number) + ending for ending in ENDINGS[layout]]


def find_layout(names: Iterable[str]) -> Layout:
    """The layout of a set with files of these names."""
    present = {name.partition(".")[2] for name in names if name.startswith(("train-", "evaluation-"))}
    if "items" in present:
        return "rows"
    return "joined" if "safetensors" in present else "text"


def spread_evenly(total: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `total`, evenly spaced and ascending."""
    count = min(total, limit)
    return [position * total // count for position in range(count)]
