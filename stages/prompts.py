"""The stage prompts: sources -> normalised, deduplicated, split and encoded -> a PromptSet.

1. Two prompts are the same if they are so without regard to case. The first one stays.
2. Without an evaluation file, whether a prompt is held out is a function of its text alone: the same in every run.
3. The sources are read twice, first to check and count them. A bad file is found before the teacher is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from dmdr import config as settings
from dmdr import teacher
from dmdr.backbones import Backbone
from dmdr.errors import DataError
from dmdr.export import check_single_file
from dmdr.promptset import Split, write_shard, write_unconditional
from stages import Context, Stopped
from stages.device import device
from stages.sources import Lines, read

BATCH = 64  # prompts encoded at once


def run(context: Context) -> dict:
    """Write the PromptSet into context.out; returns the counts.

    Raises:
        DataError: a source is empty or more than 1 % bad, a split ends up empty, or the teacher cannot be exported in
            a form that the config asks for.
        Stopped: asked to; there is no checkpoint, the stage begins anew.
    """
    prompts, progress = context.config.prompts, context.progress
    counts: Counter[str] = Counter()
    for split, _ in select(prompts, counts, progress.say):
        counts[split] += 1
        _heed(context)
    if not counts["evaluation"]:
        raise DataError("no prompt is left for evaluation; name a file in prompts.evaluation, or add prompts")
    if not counts["train"]:
        raise DataError("no prompt is left to train on: all are duplicates or evaluation prompts; add prompts")
    names = ("read", "train", "evaluation", "duplicates", "overlap", "bad")
    progress.say(", ".join(f"{name} {counts[name]:,}" for name in names))

    backbone = teacher.load(teacher.source(context.config.teacher), device(context.config))
    if "single-file" in context.config.forms:
        check_single_file(backbone)
    truncated = encode(context, backbone, counts["train"] + counts["evaluation"])
    if cut := truncated.total():
        progress.say(f"{cut:,} prompts were longer than the text encoder reads; it sees their beginning")
    facts = {name: counts[name] for name in names}
    facts |= {"truncated": cut, "truncated_evaluation": truncated["evaluation"]}
    (context.out / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def select(prompts: settings.Prompts, counts: Counter[str], say: Callable[[str], None]) -> Iterator[tuple[Split, dict]]:
    """The records that stay, each with its split; evaluation files first. Counts read, bad, duplicates and overlap."""
    evaluation: set[int] = set()
    train: set[int] = set()
    if prompts.evaluation is not None:
        for record in _read(prompts.evaluation, prompts.column, counts, say):
            if (key := identity(record["prompt"])) in evaluation:
                counts["duplicates"] += 1
                continue
            evaluation.add(key)
            yield "evaluation", record
    for source in prompts.sources:
        for record in _read(source, prompts.column, counts, say):
            key = identity(record["prompt"])
            if key in train:
                counts["duplicates"] += 1
            elif key in evaluation:
                counts["overlap"] += 1
            else:
                train.add(key)
                held_out = prompts.evaluation is None and key < prompts.evaluation_share * 2**64
                yield ("evaluation" if held_out else "train"), record


def identity(prompt: str) -> int:
    """64 bits that stand for a prompt: a million take about 100 MB, and in one of 4e7 such sets two meet by chance."""
    return int.from_bytes(hashlib.blake2b(prompt.casefold().encode(), digest_size=8).digest())


def encode(context: Context, backbone: Backbone, total: int) -> Counter[Split]:
    """Read the sources again and write the shards, each as it fills; returns how many prompts were truncated."""
    prompts = context.config.prompts
    waiting: dict[Split, list[dict]] = {"train": [], "evaluation": []}
    shards: Counter[str] = Counter()
    done, truncated = 0, Counter[Split]()

    def write(split: Split) -> None:
        nonlocal done
        records, items = waiting[split], []
        for first in range(0, len(records), BATCH):
            _heed(context)
            batch = [record["prompt"] for record in records[first : first + BATCH]]
            with torch.no_grad():
                encoded, cut = backbone.encode(batch)
            items += encoded
            truncated[split] += cut
            done += len(batch)
            context.progress.update(done, total)
        write_shard(context.out, split, shards[split], records, items)
        shards[split] += 1
        waiting[split] = []

    for split, record in select(prompts, Counter(), lambda line: None):
        waiting[split].append(record)
        if len(waiting[split]) == prompts.shard_size:
            write(split)
    for split, records in waiting.items():
        if records:
            write(split)
    with torch.no_grad():
        write_unconditional(context.out, backbone.encode([""])[0][0])
    return truncated


def _read(source: str, column: str, counts: Counter[str], say: Callable[[str], None]) -> Iterator[dict]:
    lines = Lines(source, say)
    yield from read(source, column, lines)
    counts["read"] += lines.read
    counts["bad"] += lines.bad


def _heed(context: Context) -> None:
    if context.stop():
        raise Stopped("stopped; nothing was kept, repeat the command to begin anew")
