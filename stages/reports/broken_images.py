"""Images that show nothing: not numbers, black, white, or of one colour. They are counted for every model.

An image counts where at least SHARE of its pixels are within NEAR of the colour in every channel, so that a small
object on an empty background is none of these.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stages.reports.numbers import format_count

Fault = Literal["not a number", "black", "white", "one colour"]
FAULTS: tuple[Fault, ...] = ("not a number", "black", "white", "one colour")
SHARE = 0.995
NEAR = 8  # of 255
SAMPLED = 128  # pixels a side are enough


@dataclass(frozen=True)
class BrokenImages:
    """One model. images: all that it drew; faults: how many have each of FAULTS."""

    model: str
    images: int
    faults: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.faults)


def find_fault(image: np.ndarray, is_finite: bool) -> Fault | None:
    """What is wrong with an image (H, W, 3) uint8; is_finite: whether its values were numbers."""
    if not is_finite:
        return "not a number"
    step = max(1, min(image.shape[:2]) // SAMPLED)
    pixels = image[::step, ::step].reshape(-1, 3).astype(np.int16)

    def is_near(colour: np.ndarray | int) -> bool:
        return bool((np.abs(pixels - colour).max(axis=1) <= NEAR).mean() >= SHARE)

    if is_near(0):
        return "black"
    if is_near(255):
        return "white"
    return "one colour" if is_near(np.median(pixels, axis=0)) else None


def count_faults(model: str, images: int, found: Counter[Fault]) -> BrokenImages:
    """What was found among the images of a model."""
    return BrokenImages(model, images, tuple(found[fault] for fault in FAULTS))


def describe_faults(broken: BrokenImages) -> str:
    """In words: "3 black, 1 white"; empty where nothing is broken."""
    return ", ".join(f"{count:,} {fault}" for fault, count in zip(FAULTS, broken.faults, strict=True) if count)


def say_broken(of_first: BrokenImages) -> str | None:
    """A warning about a model's images; None where all are whole."""
    if not of_first.total:
        return None
    drawn, verb = format_count(of_first.images, "image"), "shows" if of_first.total == 1 else "show"
    return f"Of {drawn} by {of_first.model}, {of_first.total:,} {verb} nothing: {describe_faults(of_first)}."
