"""The prompts of tinted garments: 70 pairs of colour and class in ten phrasings, 380 to train on and 320 held out.

The two lists share no prompt. Eight pairs, with eight different classes and all seven colours, are held out entirely.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

from dmdr.config.prompt_record import Metadata, PromptRecord
from dmdr.lab.fashion.world import CLASSES, caption
from dmdr.lab.prompts import TEMPLATES
from dmdr.lab.world import COLORS

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
HELD_OUT_SEEN = 240  # held-out prompts whose pair is trained on in another phrasing


def build_record(color: str, name: str, template: str) -> PromptRecord:
    """One prompt with GenEval's metadata: {prompt, tag, include, unseen}; unseen says whether its pair is held out."""
    metadata: Metadata = {"tag": "colors", "include": [{"class": name, "count": 1, "color": color}]}
    return {"prompt": template.format(caption(metadata)), **metadata, "unseen": (color, name) in HELD_OUT_PAIRS}


@cache
def split_prompts() -> dict[str, tuple[PromptRecord, ...]]:
    """{"train": ..., "held-out": ...}: GenEval records, a pure function of this file."""
    rng = random.Random("dmdr fashion prompts, first edition")
    everything = [build_record(*each) for each in itertools.product(COLORS, CLASSES, TEMPLATES)]
    rng.shuffle(everything)
    seen = [each for each in everything if not each["unseen"]]
    held_out = [each for each in everything if each["unseen"]] + seen[:HELD_OUT_SEEN]
    rng.shuffle(held_out)
    return {"train": tuple(seen[HELD_OUT_SEEN:]), "held-out": tuple(held_out)}


def fashion_prompts(name: str) -> tuple[PromptRecord, ...]:
    """The list called "train" or "held-out".

    Raises:
        ValueError: there is no such list.
    """
    if name not in split_prompts():
        raise ValueError(f"there is no prompt list {name!r} of garments; there are fashion:train and fashion:held-out")
    return split_prompts()[name]
