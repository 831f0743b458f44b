"""The stage prompts: normalise, deduplicate, split and encode the prompts of all sources, and write a PromptSet.

1. Prompts that differ only in case are duplicates. The first one stays.
2. Without an evaluation file, the text of a prompt alone decides whether it is held out: every run decides the same.
3. The sources are read twice, first to check and count them, so a bad file is found before the teacher is loaded. What
   later stages need is checked here too (`stages.runtime.prerequisites`).
4. A run may train on a public set that is meant for evaluation; the stage then prints a warning. Prompts that are also
   evaluation prompts of the run are left out of training.

report.json   the counts; under `sources` the counts and the sha256 of each source, and the facts of each public set
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
from dmdr.errors import DataError, Stopped, doing
from dmdr.export.rounding import check_dtype
from dmdr.export.teacher_parity import compare_teacher
from dmdr.export.write import check_single_file
from dmdr.metrics.load import check_resolution
from dmdr.promptset import Split, spread_evenly, write_shard, write_unconditional
from dmdr.teacher.load import find_teacher_of, load_teacher, note_sampler
from stages.prompt_sources.lines import Lines
from stages.prompt_sources.public_set_files import Sets, describe_set
from stages.prompt_sources.public_sets import is_named
from stages.prompt_sources.report import PromptCounts, SourceReport, Tally
from stages.prompt_sources.sources import digest_source, is_list, list_inputs, read_source, select_public_sets
from stages.runtime.context import Context
from stages.runtime.device import pick_device
from stages.runtime.prerequisites import (
    check_evaluation,
    check_student_start,
    check_teacher_settings,
    check_training,
    load_rewards,
    needs_records,
    warn_of_teacher,
)
from stages.store.records import Json

BATCH = 64  # prompts encoded at once


def run(context: Context, sets: Sets | None = None) -> Json:
    """Write the PromptSet into context.out and return the counts.

    sets: the sets that a source may name; None: the public ones.

    Raises:
        DataError: a source is empty or more than 1 % bad, a split ends up empty, or the teacher cannot be exported in
            a form that the config asks for.
        ConfigError, InputMissing, DataError: a later stage could not run, as far as that can be known now.
        Stopped: SIGTERM arrived. There is no checkpoint, so the next attempt starts from the beginning.
    """
    prompts, progress = context.config.prompts, context.progress
    sets = select_public_sets(prompts) if sets is None else sets
    tally = check_run(context.config, sets, progress.say, tick=lambda: _stop_if_asked(context))
    load_rewards(context.config)
    counts = tally.total()
    progress.say(", ".join(f"{name} {count:,}" for name, count in counts.to_dict().items()))
    reports = [_describe_source(name, source, tally, sets) for name, source in list_inputs(prompts).items()]
    for each in reports:
        if each.input != "evaluation" and each.is_for_evaluation:
            progress.say(
                f"{each.source} is meant for evaluation; after training on it, scores on its prompts mean nothing"
            )

    teacher = context.config.teacher
    source = find_teacher_of(teacher)
    if (note := note_sampler(source)) is not None:
        progress.say(note)
    backbone = load_teacher(source, pick_device(context.config), resolution=teacher.resolution)
    backbone.check_resolution()
    check_resolution(context.config.evaluate.metrics, backbone.resolution)
    few = context.config.student.few_steps
    backbone.check_student(few)
    compare_teacher(backbone, guidance_scale=teacher.guidance, few=few)
    if "single-file" in context.config.forms:
        check_single_file(backbone)
    if context.config.export.dtype == "float16":  # the others hold any number that float32 holds
        check_dtype(backbone, torch.float16)
    truncated = encode_prompts(context, backbone, counts.train + counts.evaluation, sets)
    if truncated.total():
        progress.say(
            f"{truncated.total():,} prompts are too long for the text encoder, which reads only their beginning"
        )
    facts: Json = {**counts.to_dict(), "truncated": truncated.total(), "truncated_evaluation": truncated["evaluation"]}
    report = json.dumps({**facts, "sources": [each.to_json() for each in reports]}, indent=1)
    (context.out / "report.json").write_text(f"{report}\n", encoding="utf-8")
    return facts


def check_run(
    config: settings.Config,
    sets: Sets,
    say: Callable[[str], None],
    *,
    tick: Callable[[], None] = lambda: None,
    fetches: bool = True,
) -> Tally:
    """Read all sources once, and check what can be known of the later stages; returns the counts.

    tick: called for each prompt; it may raise an error to stop. fetches: whether models may be fetched from a hub.

    Raises:
        DataError, ConfigError, InputMissing: as `run`.
    """
    tally = Tally()
    judged: list[PromptRecord] = []  # evaluation prompts, where a metric asks what their source says of them
    keeps = needs_records(config)
    for split, record in select_records(config.prompts, tally, say, sets):
        tick()
        if keeps and split == "evaluation":
            judged.append(record)
    refuse_empty(tally.total())
    check_training(config)
    warn_of_teacher(config, say, fetches=fetches)
    check_teacher_settings(config, fetches=fetches)
    check_student_start(config, say, fetches=fetches)
    indices = spread_evenly(len(judged), config.evaluate.limit or len(judged))
    check_evaluation(config, [judged[index] for index in indices], say)
    return tally


def refuse_empty(counts: PromptCounts) -> None:
    """
    Raises:
        DataError: no prompt is left to train on, or to evaluate.
    """
    if not counts.evaluation:
        raise DataError("no prompt is left for evaluation; name a file in prompts.evaluation, or add prompts")
    if not counts.train:
        raise DataError("no prompt is left to train on: all are duplicates or evaluation prompts; add prompts")


def select_records(
    prompts: settings.Prompts, tally: Tally, say: Callable[[str], None], sets: Sets | None = None
) -> Iterator[tuple[Split, PromptRecord]]:
    """Yield the records that are not left out, each with its split. Those of the evaluation file come first.

    tally: counts the records of each source.
    """
    sets = select_public_sets(prompts) if sets is None else sets
    evaluation: set[int] = set()
    train: set[int] = set()
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
    """A 64-bit hash of a prompt, without regard to case.

    A set of a million of them takes about 100 MB. In one of 4e7 such sets, two prompts have the same hash by chance.
    """
    return int.from_bytes(hashlib.blake2b(prompt.casefold().encode(), digest_size=8).digest())


def encode_prompts(context: Context, backbone: Backbone, total: int, sets: Sets) -> Counter[Split]:
    """Read the sources again and write each shard when it is full; returns the number of truncated prompts by split."""
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
        write_unconditional(context.out, backbone.encode_unconditional(context.config.teacher.unconditional))
    return truncated


def _read_records(name: str, lines: Lines, column: str, tally: Tally, sets: Sets) -> Iterator[PromptRecord]:
    with doing(f"reading the prompts of {lines.source}"):
        yield from read_source(lines.source, column, lines, sets)
    tally.add(name, "read", lines.read)
    tally.add(name, "bad", lines.bad)


def _describe_source(name: str, source: str, tally: Tally, sets: Sets) -> SourceReport:
    """Describe a source for report.json."""
    named_set = describe_set(sets.find(source), sets.find_files(source)) if is_named(source) else None
    has_name = named_set is not None or is_list(source)
    return SourceReport(
        name, source if has_name else None, digest_source(source, sets), tally.of_input(name), named_set
    )


def _stop_if_asked(context: Context) -> None:
    if context.stop():
        raise Stopped("stopped, and nothing was kept; repeat the command to start from the beginning")
