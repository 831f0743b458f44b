"""The prompts of the world of garments: 70 pairs of colour and class in ten phrasings. 380 train, 320 are held out.

The two lists share no prompt. No training prompt names any of eight pairs, which have eight different classes and all
seven colours.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

from dmdr.config.prompt_record import Metadata, PromptRecord
from dmdr.lab.fashion.vocabulary import CLASSES, caption
from dmdr.lab.prompts import TEMPLATES
from dmdr.lab.vocabulary import COLORS

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "sneaker"),
        ("green", "dress"),
        ("blue", "bag"),
        ("yellow", "trousers"),
        ("purple", "boot"),
        ("black", "sandal"),
        ("white", "pullover"),
        ("red", "coat"),
    }
)
HELD_OUT_SEEN = 240  # held-out prompts whose pair is in the training prompts, in another phrasing


def build_record(color: str, name: str, template: str) -> PromptRecord:
    """The record of a prompt: {prompt, tag, include, unseen}. unseen: whether its pair is held out."""
    metadata: Metadata = {"tag": "colors", "include": [{"class": name, "count": 1, "color": color}]}
    return {"prompt": template.format(caption(metadata)), **metadata, "unseen": (color, name) in HELD_OUT_PAIRS}


@cache
def split_prompts() -> dict[str, tuple[PromptRecord, ...]]:
    """{"train": ..., "held-out": ...}: the records of both lists, which depend on nothing but this file."""
    rng = random.Random("dmdr fashion prompts, first edition")
    records = [build_record(*each) for each in itertools.product(COLORS, CLASSES, TEMPLATES)]
    rng.shuffle(records)
    seen = [record for record in records if not record["unseen"]]
    held_out = [record for record in records if record["unseen"]] + seen[:HELD_OUT_SEEN]
    rng.shuffle(held_out)
    return {"train": tuple(seen[HELD_OUT_SEEN:]), "held-out": tuple(held_out)}


def fashion_prompts(name: str) -> tuple[PromptRecord, ...]:
    """The list named "train" or "held-out".

    Raises:
        ValueError: there is no such list.
    """
    if name not in split_prompts():
        raise ValueError(f"there is no prompt list fashion:{name}; use fashion:train or fashion:held-out")
    return split_prompts()[name]
