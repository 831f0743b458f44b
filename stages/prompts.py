"""The stage prompts: sources -> normalised, deduplicated, split and encoded -> a PromptSet.

1. Two prompts are the same if they are so without regard to case. The first one stays.
2. Without an evaluation file, whether a prompt is held out is a function of its text alone: the same in every run.
3. The sources are read twice, first to check and count them. A bad file is found before the teacher is loaded.
4. A named set for evaluation may be trained on, which is said; what is also an evaluation prompt is left out.

report.json   the counts; `sources`: the same of each source, its sha256, and what is promised of a named set
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.config import run as settings
from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import DataError, Stopped
from dmdr.export.write import check_single_file
from dmdr.promptset import Split, write_shard, write_unconditional
from dmdr.teacher.load import find_teacher_of, load_teacher
from stages.prompt_sources.formats import Lines
from stages.prompt_sources.public_set_files import Sets, describe_set
from stages.prompt_sources.public_sets import is_named
from stages.prompt_sources.report import SourceReport, Tally
from stages.prompt_sources.sources import digest_source, named_inputs, public_sets_of, read_source
from stages.runtime.context import Context
from stages.runtime.device import pick_device
from stages.store.records import Json

BATCH = 64  # prompts encoded at once


def run(context: Context, sets: Sets | None = None) -> Json:
    """Write the PromptSet into context.out; returns the counts.

    sets: all named sets; None: the public ones.

    Raises:
        DataError: a source is empty or more than 1 % bad, a split ends up empty, or the teacher cannot be exported in
            a form that the config asks for.
        Stopped: SIGTERM arrived; there is no checkpoint, so the next attempt begins anew.
    """
    prompts, progress = context.config.prompts, context.progress
    sets = public_sets_of(prompts) if sets is None else sets
    tally = Tally()
    for _ in select_records(prompts, tally, progress.say, sets):
        _stop_if_asked(context)
    counts = tally.total()
    if not counts.evaluation:
        raise DataError("no prompt is left for evaluation; name a file in prompts.evaluation, or add prompts")
    if not counts.train:
        raise DataError("no prompt is left to train on: all are duplicates or evaluation prompts; add prompts")
    progress.say(", ".join(f"{name} {count:,}" for name, count in counts.to_dict().items()))
    reports = [_describe_source(name, source, tally, sets) for name, source in named_inputs(prompts).items()]
    for each in reports:
        if each.input != "evaluation" and each.is_for_evaluation:
            progress.say(f"{each.source} is meant for evaluation; no score on it counts once it was trained on")

    backbone = load_teacher(find_teacher_of(context.config.teacher), pick_device(context.config))
    if "single-file" in context.config.forms:
        check_single_file(backbone)
    truncated = encode_prompts(context, backbone, counts.train + counts.evaluation, sets)
    if cut := truncated.total():
        progress.say(f"{cut:,} prompts were longer than the text encoder reads; it sees their beginning")
    facts: Json = {**counts.to_dict(), "truncated": cut, "truncated_evaluation": truncated["evaluation"]}
    report = json.dumps({**facts, "sources": [each.to_json() for each in reports]}, indent=1)
    (context.out / "report.json").write_text(f"{report}\n", encoding="utf-8")
    return facts


def select_records(
    prompts: settings.Prompts, tally: Tally, say: Callable[[str], None], sets: Sets | None = None
) -> Iterator[tuple[Split, PromptRecord]]:
    """The records that stay, each with its split; evaluation files first.

    tally: counts along, for each source.
    """
    sets = public_sets_of(prompts) if sets is None else sets
    evaluation: set[int] = set()
    train: set[int] = set()
    for name, source in named_inputs(prompts).items():
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
    """64 bits that stand for a prompt: a million take about 100 MB, and in one of 4e7 such sets two meet by chance."""
    return int.from_bytes(hashlib.blake2b(prompt.casefold().encode(), digest_size=8).digest())


def encode_prompts(context: Context, backbone: Backbone, total: int, sets: Sets) -> Counter[Split]:
    """Read the sources again and write the shards, each as it fills; returns how many prompts were truncated."""
    prompts = context.config.prompts
    waiting: dict[Split, list[PromptRecord]] = {"train": [], "evaluation": []}
    shards: Counter[str] = Counter()
    done, truncated = 0, Counter[Split]()

    def write(split: Split) -> None:
        nonlocal done
        records, items = waiting[split], []
        for first in range(0, len(records), BATCH):
            _stop_if_asked(context)
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

    for split, record in select_records(prompts, Tally(), lambda line: None, sets):
        waiting[split].append(record)
        if len(waiting[split]) == prompts.shard_size:
            write(split)
    for split, records in waiting.items():
        if records:
            write(split)
    with torch.no_grad():
        write_unconditional(context.out, backbone.encode([""])[0][0])
    return truncated


def _read_records(name: str, lines: Lines, column: str, tally: Tally, sets: Sets) -> Iterator[PromptRecord]:
    yield from read_source(lines.source, column, lines, sets)
    tally.add(name, "read", lines.read)
    tally.add(name, "bad", lines.bad)


def _describe_source(name: str, source: str, tally: Tally, sets: Sets) -> SourceReport:
    """A source for report.json."""
    named_set = describe_set(sets.named(source), sets.files(source)) if is_named(source) else None
    return SourceReport(name, source, digest_source(source, sets), tally.of_input(name), named_set)


def _stop_if_asked(context: Context) -> None:
    if context.stop():
        raise Stopped("stopped; nothing was kept, repeat the command to begin anew")
