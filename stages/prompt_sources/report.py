"""Count how the prompts of each source were used, for report.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields

from stages.prompt_sources.public_set_files import SetReport


@dataclass(frozen=True)
class PromptCounts:
    """The number of prompts that were read, and of those that went to each split or were left out."""

    read: int
    train: int
    evaluation: int
    duplicates: int
    overlap: int  # left out of training, because they are evaluation prompts
    bad: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


NAMES = tuple(each.name for each in fields(PromptCounts))


@dataclass
class Tally:
    """Counts the prompts of each input while they are read. Inputs are called evaluation, source:0, source:1 ..."""

    _by_input: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, name: str, count: str, number: int = 1) -> None:
        """Add `number` to one of the counts of an input. count: a field of PromptCounts."""
        self._by_input.setdefault(name, Counter())[count] += number

    def of_input(self, name: str) -> PromptCounts:
        return _freeze(self._by_input.get(name, Counter()))

    def total(self) -> PromptCounts:
        return _freeze(sum(self._by_input.values(), Counter()))


def _freeze(counter: Counter[str]) -> PromptCounts:
    return PromptCounts(**{name: counter[name] for name in NAMES})


@dataclass(frozen=True)
class SourceReport:
    """One source in report.json.

    source: the public set or the lab's list that it names, None for files: where they lie is no part of a result.
    named_set: the facts of a public set.
    """

    input: str
    source: str | None
    sha256: str
    counts: PromptCounts
    named_set: SetReport | None

    @property
    def is_for_evaluation(self) -> bool:
        return self.named_set is not None and self.named_set.kind == "evaluation"

    def to_json(self) -> dict[str, object]:
        source = {} if self.source is None else {"source": self.source}
        own = {"input": self.input, **source, "sha256": self.sha256, **self.counts.to_dict()}
        if self.named_set is None:
            return own
        return {**own, **self.named_set.to_json(), "found": self.counts.read - self.counts.bad}
