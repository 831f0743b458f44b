"""The stage prompts: normalise, deduplicate, split and encode the prompts of all sources, and write a PromptSet.

1. Prompts that differ only in case are duplicates. The first one stays.
2. Without an evaluation file, the text of a prompt alone decides whether it is held out: every run decides the same.
3. The sources are read twice, first to check and count them, so a bad file is found before the teacher is loaded. What
   later stages need is checked here too (`stages.runtime.prerequisites`). Neither pass holds the prompts in memory, and
   a shard is in the store as soon as it is finished: the next attempt goes on after it.
4. A run may train on a public set that is meant for evaluation; the stage then prints a warning. Prompts that are also
   evaluation prompts of the run are left out of training.
5. `prompts.encode: on_the_fly` stores the texts only, and so does `auto` for a large set (`dmdr/promptset/encode.py`).

report.json   the counts; under `sources` the counts and the sha256 of each source, and the facts of each public set
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.config import run as settings
from dmdr.config.evaluation import JUDGES
from dmdr.errors import DataError
from dmdr.export.rounding import check_dtype
from dmdr.export.teacher_parity import compare_teacher
from dmdr.export.write import check_single_file
from dmdr.metrics.load import check_resolution
from dmdr.metrics.verifier import TrainingPrompts
from dmdr.promptset import spread_evenly, write_unconditional
from dmdr.promptset.encode import DTYPES, choose_layout, convert, count_numbers
from dmdr.rollout import note_one_step
from dmdr.teacher.load import find_teacher_of, load_teacher, note_sampler
from stages.prompt_sources.public_set_files import Sets, describe_set
from stages.prompt_sources.public_sets import is_named
from stages.prompt_sources.record_spool import RecordSpool
from stages.prompt_sources.report import PromptCounts, SourceReport, Tally
from stages.prompt_sources.selection import select_records
from stages.prompt_sources.sources import digest_source, is_list, list_inputs, select_public_sets
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
from stages.runtime.prompt_shards import ShardWriter, stop_if_asked
from stages.store.records import Json


def run(context: Context, sets: Sets | None = None) -> Json:
    """Write the PromptSet into context.out and return the counts.

    sets: the sets that a source may name; None: the public ones.

    Raises:
        DataError: a source is empty or more than 1 % bad, a split ends up empty, or the teacher cannot be exported in
            a form that the config asks for.
        ConfigError, InputMissing, DataError: a later stage could not run, as far as that can be known now.
        Stopped: SIGTERM arrived. The next attempt goes on after the shards that are finished.
    """
    prompts, progress = context.config.prompts, context.progress
    sets = select_public_sets(prompts) if sets is None else sets
    tally = check_run(context.config, sets, progress.say, tick=lambda: stop_if_asked(context))
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
    check_resolution(list_sized(context.config), backbone.resolution)
    few = context.config.student.few_steps
    backbone.check_student(few)
    if (note := note_one_step(backbone, few)) is not None:
        progress.say(note)
    compare_teacher(backbone, guidance_scale=teacher.guidance, few=few)
    if "single-file" in context.config.forms:
        check_single_file(backbone)
    if context.config.export.dtype == "float16":  # the others hold any number that float32 holds
        check_dtype(backbone, torch.float16)
    writer = write_prompts(context, backbone, counts, sets)
    truncated = writer.truncated
    if truncated.total():
        progress.say(
            f"{truncated.total():,} prompts are too long for the text encoder, which reads only their beginning"
        )
    facts: Json = {**counts.to_dict(), "truncated": truncated.total(), "truncated_evaluation": truncated["evaluation"]}
    if writer.layout != "joined":  # the layout of all results before there were others
        facts |= {"encode": "stage" if writer.layout == "rows" else "on_the_fly"}
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
    judged = RecordSpool()  # evaluation prompts, where a metric asks what their source says of them
    keeps = needs_records(config)
    train = TrainingPrompts(config.trained_rewards)
    for split, record in select_records(config.prompts, tally, say, sets):
        tick()
        if split == "train":
            train.look(record)
        elif keeps:
            judged.append(record)
    refuse_empty(tally.total())
    train.refuse_lacking()
    check_training(config)
    warn_of_teacher(config, say, fetches=fetches)
    check_teacher_settings(config, fetches=fetches)
    check_student_start(config, say, fetches=fetches)
    indices = spread_evenly(len(judged), config.evaluate.limit or len(judged))
    check_evaluation(config, judged.select(indices), say)
    return tally


def list_sized(config: settings.Config) -> tuple[str, ...]:
    """The metrics that judge images, in evaluation and as rewards."""
    trained = {name.removesuffix("-soft") for name in config.trained_rewards}
    return (*config.evaluate.metrics, *trained.intersection(JUDGES))


def refuse_empty(counts: PromptCounts) -> None:
    """Refuse prompts of which a split is empty.

    Raises:
        DataError: no prompt is left to train on, or to evaluate.
    """
    if not counts.evaluation:
        raise DataError("no prompt is left for evaluation; name a file in prompts.evaluation, or add prompts")
    if not counts.train:
        raise DataError("no prompt is left to train on: all are duplicates or evaluation prompts; add prompts")


def write_prompts(context: Context, backbone: Backbone, counts: PromptCounts, sets: Sets) -> ShardWriter:
    """Read the sources again and write all shards, and the empty prompt; returns who wrote them.

    Raises:
        Stopped: as `run`.
    """
    prompts, total, numbers = context.config.prompts, counts.train + counts.evaluation, count_numbers(backbone.blank())
    layout, dtype = choose_layout(prompts, total, numbers), DTYPES[prompts.dtype]
    if layout != "joined":
        size = f"the states of {total:,} prompts take {total * numbers * dtype.itemsize / 2**30:,.1f} GiB"
        way = "on the fly: only their texts are stored" if layout == "text" else "here"
        context.progress.say(f"{size}; they are encoded {way}")
    writer = ShardWriter(context, backbone, total=total, layout=layout, dtype=dtype)
    writer.write_all(select_records(prompts, Tally(), lambda line: None, sets))
    with torch.no_grad():
        empty = backbone.encode_unconditional(context.config.teacher.unconditional)
        write_unconditional(context.out, convert(empty, dtype))
    return writer


def _describe_source(name: str, source: str, tally: Tally, sets: Sets) -> SourceReport:
    """Describe a source for report.json."""
    named_set = describe_set(sets.find(source), sets.find_files(source)) if is_named(source) else None
    has_name = named_set is not None or is_list(source)
    return SourceReport(
        name, source if has_name else None, digest_source(source, sets), tally.of_input(name), named_set
    )
