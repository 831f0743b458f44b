"""The work of operators: kind, dtype, FLOPs and bytes, and how often each is done. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Kind = Literal["product", "attention", "attention backward", "convolution", "elementwise"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # elementwise: norms, casts, copies and whatever else multiplies no matrices


class Work(NamedTuple):
    """What one operator does. dtype: of its first tensor. bytes: of the memory that it reads and writes."""

    kind: Kind
    dtype: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Tally:
    """Work, how often each is done, and the FLOPs together. again: FLOPs among them that are computed a second time."""

    operators: dict[Work, float] = field(default_factory=dict)
    flops: float = 0.0
    again: float = 0.0

    @property
    def launches(self) -> float:
        return sum(self.operators.values())

    def __iter__(self) -> Iterator[tuple[Work, float]]:
        return iter(self.operators.items())

    def __add__(self, other: Tally) -> Tally:
        names = dict.fromkeys((*self.operators, *other.operators))
        counts = {name: self.operators.get(name, 0) + other.operators.get(name, 0) for name in names}
        return Tally(counts, self.flops + other.flops, self.again + other.again)

    def __sub__(self, other: Tally) -> Tally:
        """What is left of it without `other`; a kind of operator of which nothing is left is dropped."""
        counts = {work: count - other.operators.get(work, 0) for work, count in self}
        left = {work: count for work, count in counts.items() if count > 0}
        return Tally(left, self.flops - other.flops, self.again - other.again)

    def scale(self, factor: float) -> Tally:
        counts = {work: count * factor for work, count in self}
        return Tally(counts, self.flops * factor, self.again * factor)
