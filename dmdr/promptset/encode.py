"""Encode prompts, and decide which way the prompts of a run are encoded.

1. The text encoders compute in float32. States that are kept in bfloat16 are rounded once, at the end. A network that
   computes in bfloat16 rounds them in the same way: training with `precision: bfloat16` gets equal numbers.
2. The padding of SD3's T5, SDXL's CLIP and FLUX's T5 stays: their pipelines do not mask it, its states differ from
   prompt to prompt, and the network attends to them. Only equal tokens at the end are kept once (`backbones/sd3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dmdr.backbones.protocol import Backbone, Item
from dmdr.config.inputs import Prompts
from dmdr.promptset.layout import Layout

BATCH = 64  # prompts encoded at once
MOST_STORED = 32 * 2**30  # bytes of states up to which `auto` stores them: minutes to fetch, and most disks hold them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of prompts.dtype


def choose_layout(prompts: Prompts, count: int, numbers: int) -> Layout:
    """The layout of a set of `count` prompts: text where they are encoded on the fly.

    numbers: of the conditioning of a typical prompt.
    """
    size = count * numbers * DTYPES[prompts.dtype].itemsize
    if prompts.encode == "on_the_fly" or (prompts.encode == "auto" and size > MOST_STORED):
        return "text"
    return "joined" if prompts.dtype == "float32" and size <= MOST_STORED else "rows"


def count_numbers(item: Item) -> int:
    """The numbers in an item."""
    return sum(tensor.numel() for tensor in item.values())


def encode_batches(backbone: Backbone, prompts: list[str], dtype: torch.dtype) -> Iterator[tuple[list[Item], int]]:
    """Encode prompts batch by batch; yields the items of a batch, and how many of its prompts are too long."""
    for first in range(0, len(prompts), BATCH):
        with torch.no_grad():
            items, truncated = backbone.encode(prompts[first : first + BATCH])
        yield [convert(item, dtype) for item in items], truncated


def convert(item: Item, dtype: torch.dtype) -> Item:
    """The item with its floating-point tensors in `dtype`."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in item.items()}
