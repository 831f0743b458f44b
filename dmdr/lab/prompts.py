"""The prompts of the world of shapes: all captions in ten phrasings, split into training and 1,200 held-out prompts.

The two lists share no prompt. No training prompt names any of four pairs of colour and shape, so that a good score on
them does not come from a memorised caption (geneval_unseen_objects does the same for objects).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache

from dmdr.config.prompt_record import Metadata, Need, PromptRecord
from dmdr.lab.vocabulary import COLORS, COUNTS, RELATIONS, SHAPES, caption

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
TRAIN_LIMIT = 1500  # largest number of training prompts with the same tag


def build_need(shape: str, color: str | None = None, count: int = 1) -> Need:
    """One clause of GenEval's metadata."""
    return {"class": shape, "count": count, "color": color} if color else {"class": shape, "count": count}


def iterate_needs(tag: str) -> Iterator[list[Need]]:
    """What the captions of a tag ask for: one list of clauses for each caption, in a fixed order."""
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


def iterate_metadata(tag: str) -> Iterator[Metadata]:
    """All metadata of a tag, in a fixed order. In counting, one object more is too many."""
    for needs in iterate_needs(tag):
        if tag == "counting":
            (need,) = needs
            yield {"tag": tag, "include": needs, "exclude": [build_need(need["class"], count=need["count"] + 1)]}
        else:
            yield {"tag": tag, "include": needs}


def find_held_out_pairs(metadata: Metadata) -> set[tuple[str, str]]:
    """The held-out pairs of colour and shape that the metadata names."""
    named = {(need["color"], need["class"]) for need in metadata["include"] if "color" in need}
    return named & HELD_OUT_PAIRS


def build_record(metadata: Metadata, template: str) -> PromptRecord:
    """The record of a prompt: {prompt, tag, include, exclude?, unseen}. unseen: whether it names a held-out pair."""
    return {"prompt": template.format(caption(metadata)), **metadata, "unseen": bool(find_held_out_pairs(metadata))}


@cache
def split_prompts() -> dict[str, tuple[PromptRecord, ...]]:
    """{"train": ..., "held-out": ...}: the records of both lists, which depend on nothing but this file."""
    rng = random.Random("dmdr lab prompts, first edition")
    lists: dict[str, list[PromptRecord]] = {"train": [], "held-out": []}
    for tag, count in HELD_OUT.items():
        candidates = [build_record(m, t) for m in iterate_metadata(tag) for t in TEMPLATES]
        rng.shuffle(candidates)
        unseen = [record for record in candidates if record["unseen"]]
        seen = [record for record in candidates if not record["unseen"]]
        quota = min(len(unseen), count // 4)  # at most a quarter of the held-out prompts name a held-out pair
        lists["held-out"] += unseen[:quota] + seen[: count - quota]
        lists["train"] += seen[count - quota :][:TRAIN_LIMIT]
    for records in lists.values():
        rng.shuffle(records)
    return {name: tuple(records) for name, records in lists.items()}


def lab_prompts(name: str) -> tuple[PromptRecord, ...]:
    """The list named "train" or "held-out".

    Raises:
        ValueError: there is no such list.
    """
    if name not in split_prompts():
        raise ValueError(f"there is no prompt list lab:{name}; use lab:train or lab:held-out")
    return split_prompts()[name]
