"""What every compared model draws, its division into shards, and the files that keep finished shards.

A shard depends neither on the number of processes nor on their batches: every process would draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dmdr import distributed
from dmdr.config.prompt_record import PromptRecord
from dmdr.promptset.prompts import Prompts
from stages.runtime.context import Context
from stages.runtime.prompt_inputs import PromptInputs
from stages.store.shards import Shards

SHARD = 128  # images; at most so many are lost when an attempt is killed


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts that every model draws.

    indices: of the prompts in their set. records: of the same prompts, in the same order. seeds: images of each.
    A prompt's place is its position in `indices`.
    """

    prompts: Prompts
    indices: list[int]
    records: list[PromptRecord]
    seeds: int

    def shards(self) -> list[range]:
        """The places of each shard's prompts."""
        size = max(1, SHARD // self.seeds)
        return [range(first, min(first + size, len(self.indices))) for first in range(0, len(self.indices), size)]

    def own_shards(self) -> dict[int, range]:
        """The shards of this rank: number -> places."""
        shards = self.shards()
        return {number: shards[number] for number in range(distributed.rank(), len(shards), distributed.ranks())}

    def split_batches(self, places: range, batch_size: int) -> Iterator[range]:
        """Places in batches of at most `batch_size` images, but of one prompt at least: its images stay together."""
        size = max(1, batch_size // self.seeds)
        for first in range(0, len(places), size):
            yield places[first : first + size]


@dataclass(frozen=True)
class Attempt:
    """One attempt of the stage, in one process. shards: finished ones, of all ranks and of earlier attempts.

    inputs: the sealed prompts. work: model -> the work to draw one prompt, where to judge one is 1. tick: shows that so
    much more work is done.
    """

    context: Context
    inputs: PromptInputs
    evaluation_set: EvaluationSet
    shards: Shards
    work: dict[str, int]
    tick: Callable[[int], None]

    @property
    def batch_size(self) -> int:
        """Images that are drawn or judged at once."""
        return self.context.config.evaluate.batch_size


def model_folder(model: str) -> str:
    """A model's name as files and folders have it."""
    return model.replace(" ", "-")


def images_file(model: str, shard: int) -> str:
    """The file with the images of one shard of a model."""
    return f"samples/{model_folder(model)}-{shard:05d}.tar"


def scores_file(model: str, shard: int) -> str:
    """The file with the scores of one shard of a model."""
    return f"scores/{model_folder(model)}-{shard:05d}.json"
