"""Count the prompts of a config for a plan, without fetching anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dmdr.config.inputs import Prompts
from stages.prompt_sources.lines import Lines
from stages.prompt_sources.public_sets import is_named
from stages.prompt_sources.report import Tally
from stages.prompt_sources.selection import select_records
from stages.prompt_sources.sources import list_inputs, read_source, select_public_sets


@dataclass(frozen=True)
class PromptCount:
    """Prompts of both splits. exact: False for an upper bound, which still has duplicates."""

    train: int
    evaluation: int
    exact: bool

    @property
    def total(self) -> int:
        return self.train + self.evaluation


def count_prompts(prompts: Prompts) -> PromptCount:
    """Count the prompts of all sources. Public sets are not fetched: they have their published number of prompts.

    Raises:
        InputMissing: a file does not exist.
        ConfigError, DataError: a source cannot be read.
    """
    inputs, say = list_inputs(prompts), _say_nothing
    if not any(map(is_named, inputs.values())):
        splits = Counter(split for split, _ in select_records(prompts, Tally(), say))
        return PromptCount(splits["train"], splits["evaluation"], exact=True)
    numbers = {name: _count_source(prompts, source, say) for name, source in inputs.items()}
    evaluation = numbers.pop("evaluation", None)
    total = sum(numbers.values())
    if evaluation is None:
        evaluation = round(total * prompts.evaluation_share)
        total -= evaluation
    return PromptCount(total, evaluation, exact=False)


def _count_source(prompts: Prompts, source: str, say: Callable[[str], None]) -> int:
    if is_named(source):
        return select_public_sets(prompts).find(source).rows or 0
    return sum(1 for _ in read_source(source, prompts.column, Lines(source, say)))


def _say_nothing(line: str) -> None:
    """A plan reports no bad lines; the stage prompts does."""
