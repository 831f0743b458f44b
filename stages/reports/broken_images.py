"""Images that show nothing: not numbers, black, white, or of one colour. They are counted for every model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dmdr.metrics.faults import FAULTS, Fault
from stages.reports.numbers import format_count


@dataclass(frozen=True)
class BrokenImages:
    """One model. images: all that it drew; faults: how many have each of FAULTS."""

    model: str
    images: int
    faults: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.faults)


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
