"""Select the prompts of all sources: leave out duplicates, and split the rest into training and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dmdr.config.inputs import Prompts
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import doing
from stages.prompt_sources.key_set import KeySet
from stages.prompt_sources.lines import Lines
from stages.prompt_sources.public_set_files import Sets
from stages.prompt_sources.report import Tally
from stages.prompt_sources.sources import list_inputs, read_source, select_public_sets

if TYPE_CHECKING:
    from dmdr.promptset import Split  # brings torch


def select_records(
    prompts: Prompts, tally: Tally, say: Callable[[str], None], sets: Sets | None = None
) -> Iterator[tuple[Split, PromptRecord]]:
    """Yield the records that are not left out, each with its split. Those of the evaluation file come first.

    It holds 12 to 24 bytes of each prompt: the hashes by which it knows duplicates.

    tally: counts the records of each source.
    """
    sets = select_public_sets(prompts) if sets is None else sets
    evaluation, train = KeySet(), KeySet()
    for name, source in list_inputs(prompts).items():
        for record in _read_records(name, Lines(source, say), prompts.column, tally, sets):
            key = prompt_key(record["prompt"])
            own = evaluation if name == "evaluation" else train
            if key in own:
                tally.add(name, "duplicates")
            elif key in evaluation:
                tally.add(name, "overlap")
            else:
                own.add(key)
                held_out = prompts.evaluation is None and key < prompts.evaluation_share * 2**64
                split: Split = "evaluation" if held_out or name == "evaluation" else "train"
                tally.add(name, split)
                yield split, record


def prompt_key(prompt: str) -> int:
    """A 64-bit hash of a prompt, without regard to case. In one of 4e7 sets of a million prompts, two of them have the
    same hash by chance."""
    return int.from_bytes(hashlib.blake2b(prompt.casefold().encode(), digest_size=8).digest())


def _read_records(name: str, lines: Lines, column: str, tally: Tally, sets: Sets) -> Iterator[PromptRecord]:
    with doing(f"reading the prompts of {lines.source}"):
        yield from read_source(lines.source, column, lines, sets)
    tally.add(name, "read", lines.read)
    tally.add(name, "bad", lines.bad)
