"""Write the prompts of a run shard by shard, each into the store at once; shards of an earlier attempt are kept.

In memory are the texts of two shards that fill up and, but for the layout joined, one batch of encoded prompts. On the
disk of this machine is one shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from dmdr.backbones.protocol import Backbone, Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import Stopped
from dmdr.promptset import Split, write_shard
from dmdr.promptset.encode import BATCH, encode_batches
from dmdr.promptset.layout import Layout, name_files, name_shard
from stages.runtime.context import Context
from stages.store.partial_result import PartialResult

TRUNCATED = "truncated"  # what is kept about a shard: the number of its prompts that the text encoder cuts


class ShardWriter:
    """Writes the shards of both splits. total: prompts in all, for the progress. truncated: those cut so far."""

    def __init__(self, context: Context, backbone: Backbone, *, total: int, layout: Layout, dtype: torch.dtype) -> None:
        self.context, self.backbone, self.total, self.layout, self.dtype = context, backbone, total, layout, dtype
        self.truncated: Counter[Split] = Counter()
        self._parts = PartialResult(context.artifact)
        self._shards: Counter[Split] = Counter()
        self._done = self._found = 0

    def write_all(self, records: Iterable[tuple[Split, PromptRecord]]) -> None:
        """Write all shards, each when it is full.

        Raises:
            Stopped: the stage was told to stop; finished shards are kept.
        """
        size = self.context.config.prompts.shard_size
        waiting: dict[Split, list[PromptRecord]] = {"train": [], "evaluation": []}
        for split, record in records:
            waiting[split].append(record)
            if len(waiting[split]) == size:
                self._write(split, waiting[split])
                waiting[split] = []
        for split, rest in waiting.items():
            if rest:
                self._write(split, rest)

    def _write(self, split: Split, records: list[PromptRecord]) -> None:
        number = self._shards[split]
        self._shards[split] += 1
        part, names = name_shard(split, number), name_files(self.layout, split, number)
        stop_if_asked(self.context)
        about = self._parts.find(part, names)
        if about is not None and about.keys() == {TRUNCATED}:
            self._found += 1
            self._count(len(records))
        else:
            if self._found:
                self.context.progress.say(f"goes on after {self._found:,} shards of an earlier attempt")
                self._found = 0
            about = self._make(split, number, records)
            self._parts.keep(part, [self.context.out / name for name in names], about)
        self.truncated[split] += about[TRUNCATED]

    def _make(self, split: Split, number: int, records: list[PromptRecord]) -> dict[str, int]:
        texts = [record["prompt"] for record in records]
        truncated = 0

        def encode() -> Iterator[Item]:
            nonlocal truncated
            for items, cut in encode_batches(self.backbone, texts, self.dtype):
                stop_if_asked(self.context)
                truncated += cut
                yield from items
                self._count(len(items))

        write_shard(self.context.out, split, number, records, encode(), layout=self.layout)
        if self.layout == "text":
            for first in range(0, len(texts), BATCH):
                truncated += self.backbone.count_truncated(texts[first : first + BATCH])
            self._count(len(texts))
        return {TRUNCATED: truncated}

    def _count(self, more: int) -> None:
        self._done += more
        self.context.progress.update(self._done, self.total)


def stop_if_asked(context: Context) -> None:
    """
    Raises:
        Stopped: the stage was told to stop.
    """
    if context.stop():
        raise Stopped("stopped; the shards that are finished are kept, repeat the command to go on")
