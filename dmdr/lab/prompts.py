"""The lab's prompts: every caption of the world in ten phrasings, split into a training list and 1,200 held-out ones.

The two lists share no prompt. Four colour-shape pairs are held out entirely: no training prompt names them together,
so that a good score on them is not a memorised caption (as geneval_unseen_objects does for objects).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache

from dmdr.config.prompt_record import Metadata, Need, PromptRecord
from dmdr.lab.world import COLORS, COUNTS, RELATIONS, SHAPES, caption

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a painting of {}",
    "a rendering of {}",
    "a sketch of {}",
    "a poster of {}",
    "a view of {}",
)
HELD_OUT_PAIRS = frozenset({("red", "cross"), ("green", "triangle"), ("blue", "square"), ("purple", "circle")})
HELD_OUT = {"single_object": 20, "two_object": 60, "counting": 260, "colors": 140, "position": 360, "color_attr": 360}
TRAIN_LIMIT = 1500  # prompts a tag in the training list


def build_need(shape: str, color: str | None = None, count: int = 1) -> Need:
    """One clause of GenEval's metadata."""
    return {"class": shape, "count": count, "color": color} if color else {"class": shape, "count": count}


def iterate_needs(tag: str) -> Iterator[list[Need]]:
    """What the captions of a tag ask for, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    colors = (None, *COLORS)
    if tag == "single_object":
        yield from ([build_need(shape)] for shape in SHAPES)
    if tag == "two_object":
        yield from ([build_need(a), build_need(b)] for a, b in pairs)
    if tag == "counting":
        for shape, count, color in itertools.product(SHAPES, COUNTS, colors):
            yield [build_need(shape, color, count)]
    if tag == "colors":
        yield from ([build_need(shape, color)] for shape, color in itertools.product(SHAPES, COLORS))
    if tag == "position":  # the object of the relation first, then its subject
        for (a, b), relation, c, d in itertools.product(pairs, RELATIONS, colors, colors):
            if (c is None) == (d is None):
                yield [build_need(a, c), {**build_need(b, d), "position": (relation, 0)}]
    if tag == "color_attr":
        for (a, b), (c, d) in itertools.product(pairs, itertools.permutations(COLORS, 2)):
            yield [build_need(a, c), build_need(b, d)]


def iterate_contents(tag: str) -> Iterator[Metadata]:
    """All the metadata of a tag, in a fixed order. Where things are to be counted, one more is too many."""
    for needs in iterate_needs(tag):
        if tag == "counting":
            (need,) = needs
            yield {"tag": tag, "include": needs, "exclude": [build_need(need["class"], count=need["count"] + 1)]}
        else:
            yield {"tag": tag, "include": needs}


def unseen_pairs(metadata: Metadata) -> set[tuple[str, str]]:
    """The held-out colour-shape pairs that it names."""
    named = {(need["color"], need["class"]) for need in metadata["include"] if "color" in need}
    return named & HELD_OUT_PAIRS


def build_record(metadata: Metadata, template: str) -> PromptRecord:
    """One prompt: {prompt, tag, include, exclude?, unseen}."""
    return {"prompt": template.format(caption(metadata)), **metadata, "unseen": bool(unseen_pairs(metadata))}


@cache
def split_prompts() -> dict[str, tuple[PromptRecord, ...]]:
    """{"train": ..., "held-out": ...}: GenEval records, a pure function of this file."""
    rng = random.Random("dmdr lab prompts, first edition")
    lists: dict[str, list[PromptRecord]] = {"train": [], "held-out": []}
    for tag, wanted in HELD_OUT.items():
        everything = [build_record(m, t) for m in iterate_contents(tag) for t in TEMPLATES]
        rng.shuffle(everything)
        never_seen = [r for r in everything if r["unseen"]]
        others = [r for r in everything if not r["unseen"]]
        quota = min(len(never_seen), wanted // 4)  # a quarter of the held-out prompts name a held-out pair
        lists["held-out"] += never_seen[:quota] + others[: wanted - quota]
        lists["train"] += others[wanted - quota :][:TRAIN_LIMIT]
    for records in lists.values():
        rng.shuffle(records)
    return {name: tuple(records) for name, records in lists.items()}


def lab_prompts(name: str) -> tuple[PromptRecord, ...]:
    """The list called "train" or "held-out".

    Raises:
        ValueError: there is no such list.
    """
    if name not in split_prompts():
        raise ValueError(f"the lab has no prompt list {name!r}; it has lab:train and lab:held-out")
    return split_prompts()[name]
