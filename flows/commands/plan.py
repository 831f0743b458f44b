"""`dmdr plan`: prints what a config needs before anyone pays for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from dmdr.config.load import load_config
from dmdr.errors import InputMissing
from dmdr.planning.gpus import GIB, GPUS, Gpu, advise
from dmdr.planning.roofline import LAUNCHES, compute_mfu, estimate_stage, estimate_update
from dmdr.planning.scaling import list_machines, scale_update
from dmdr.planning.work import KINDS
from stages.reports.scorecard_text import format_table
from stages.runtime.prerequisites import check_student_start, warn_of_teacher
from stages.store.teacher_folder import resolve_teacher

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from dmdr.planning.prompts import Way
    from dmdr.planning.stage_plan import StagePlan
    from dmdr.promptset.layout import Layout

NAMES = {  # of kinds of operators, for people
    "product": "matrix products",
    "convolution": "convolutions",
    "elementwise": "elementwise, norms, casts, copies",
    LAUNCHES: "beginning operators",
}
ASSUMED = 100_000  # prompts, where nobody knows how many there are


def print_plan(path: str, gpu: str, nodes: int = 1) -> int:
    """Print parameters, memory, work and hours of the training stages on a GPU, what the prompts cost, and what to
    change where it does not fit. Returns 0: a plan that does not fit is an answer.

    nodes: machines up to which the plan also says what more of them bring.
    """
    from dmdr.planning import plan as planning
    from dmdr.planning import prompts as prompt_plan
    from dmdr.planning.text_encoders import count_text_bytes

    config, card = resolve_teacher(load_config(path), None, lambda size: None), GPUS[gpu]
    warn_of_teacher(config, print, fetches=False)
    try:
        check_student_start(config, print, fetches=False)
    except InputMissing as error:  # a plan needs no weights
        print(f"{error}; the plan counts one that fits")
    plans: list[StagePlan] = []
    for stage in config.training_stages:
        _show_progress(f"{stage}: building it without weights")
        plans.append(planning.plan_stage(config, stage, say=_show_parts_of(stage)))
    _show_progress("counting the prompts")
    count, note = _count_prompts(config)
    encoders = count_text_bytes(config.teacher)
    layout = prompt_plan.choose(config, count, plans)
    prompt_plan.add_text_encoders(config, layout, plans, encoders)
    _show_progress("")
    print(f"{config.run}: {config.teacher.path}\n{plans[0].ranks} x {card.name}, {config.precision}\n")
    print(_describe_parameters(plans[0]))
    unit, size = ("GiB", GIB) if max(plan.peak for plan in plans) >= GIB else ("MiB", 2**20)
    print(f"\nmemory of each GPU, {unit} ({card.free / GIB:.1f} GiB are free for tensors)")
    print(format_table(_list_memory(plans, size)))
    print("\nwork of one update, forward-equivalents (F = one forward of the base on the whole batch)")
    print(format_table(_list_work(plans)))
    print(f"\ntime, estimated from the operators; the data sheet has {card.rate(config.precision) / 1e12:,.0f} TFLOP/s")
    print(format_table(_list_hours(plans, card, config.precision)))
    print("prompts, export and evaluation come on top, and so do checkpoints and the watched reward.\n")
    print(note)
    ways = prompt_plan.list_ways(config, count, plans, encoders)
    print(format_table(_list_ways(config, ways, layout)))
    print(_explain_choice(config, layout) + "\n")
    for line in advise(config, plans, card):
        print(line)
    for plan in plans if nodes > 1 else []:
        print(f"\n{plan.stage} on more machines, each GPU with the same share of a larger batch, estimated")
        print(format_table(_list_machines(config, plan, card, nodes)))
    return 0


def _count_prompts(config: Config) -> tuple[int, str]:
    """How many prompts the config has, and a line about them. Where the sources are elsewhere, a round number."""
    from stages.prompt_sources.counting import count_prompts

    try:
        count = count_prompts(config.prompts)
    except InputMissing as error:
        return ASSUMED, f"prompts: for {ASSUMED:,} of them, because the sources are not here ({error})"
    about = "" if count.exact else "at most "
    return count.total, f"prompts: {about}{count.train:,} to train on, {count.evaluation:,} for evaluation"


def _list_ways(config: Config, ways: list[Way], layout: Layout) -> list[list[str]]:
    on = "GPU" if config.execution.text_encoders == "device" else "host"
    titles = [f"{way.name}{'' if way.encoders else f', {way.dtype}'}" for way in ways]
    return [
        [
            "",
            *(
                f"{title} *" if way.is_chosen(config, layout) else title
                for title, way in zip(titles, ways, strict=True)
            ),
        ],
        ["a prompt in the store, KiB", *(f"{way.each / 2**10:,.1f}" for way in ways)],
        ["all prompts in the store, GiB", *(f"{way.stored / GIB:,.2f}" for way in ways)],
        ["each process reads in training, GiB", *(f"{way.read / GIB:,.2f}" for way in ways)],
        ["of them on its disk, at most, GiB", *(f"{way.kept / GIB:,.2f}" for way in ways)],
        [f"text encoders in the memory of the {on}, GiB", *(f"{way.encoders / GIB:,.2f}" for way in ways)],
    ]


def _explain_choice(config: Config, layout: Layout) -> str:
    """Which way the run takes, and why."""
    from dmdr.promptset.encode import MOST_STORED

    chosen = "on_the_fly" if layout == "text" else "stage"
    if config.prompts.encode != "auto":
        return f"* prompts.encode is {chosen}"
    than = "more than" if layout == "text" else "at most"
    return f"* prompts.encode is auto: {chosen}, because the states take {than} {MOST_STORED / GIB:.0f} GiB"


def _show_progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _show_parts_of(stage: str) -> Callable[[str], None]:
    """A function that shows which part of a stage is being planned."""
    return lambda part: _show_progress(f"{stage}: {part}")


def _describe_parameters(plan: StagePlan) -> str:
    return (
        f"parameters: teacher {plan.teacher / 1e6:,.1f} M, trained of the student "
        f"{plan.trained['student'] / 1e6:,.1f} M, of the fake score {plan.trained['fake_score'] / 1e6:,.1f} M"
    )


def _list_memory(plans: list[StagePlan], size: int) -> list[list[str]]:
    """The rows of a table. size: bytes of its unit."""
    names = list(dict.fromkeys(name for plan in plans for name, held in plan.parts.items() if held))
    rows = [["", *(plan.stage for plan in plans)]]
    rows += [[name, *(f"{plan.parts.get(name, 0) / size:.2f}" for plan in plans)] for name in names]
    rows.append(["an update beside it, at most", *(f"{plan.update / size:.2f}" for plan in plans)])
    rows.append(["together", *(f"{plan.peak / size:.2f}" for plan in plans)])
    if any(plan.load for plan in plans):
        rows.append(["while it is loaded", *(f"{plan.load / size:.2f}" for plan in plans)])
    return rows


def _list_work(plans: list[StagePlan]) -> list[list[str]]:
    names = list(dict.fromkeys(name for plan in plans for name, work in plan.work.items() if work))
    rows = [["", *(plan.stage for plan in plans)]]
    rows += [[name, *(f"{plan.work.get(name, 0) / plan.forward:.2f}" for plan in plans)] for name in names]
    rows.append(["without the reward", *(f"{plan.equivalents:.2f}" for plan in plans)])
    rows.append(["nothing computed twice", *(f"{plan.floor:.2f}" for plan in plans)])
    rows.append(["TFLOP an update", *(f"{plan.flops / 1e12:,.1f}" for plan in plans)])
    return rows


def _list_hours(plans: list[StagePlan], card: Gpu, precision: str) -> list[list[str]]:
    times = [estimate_update(plan, card) for plan in plans]
    mfus = [compute_mfu(plan, time.seconds, card, precision) for plan, time in zip(plans, times, strict=True)]
    hours = [estimate_stage(plan, card) / 3600 for plan in plans]
    gpu_hours = [each * plan.ranks for each, plan in zip(hours, plans, strict=True)]
    warmup = [["of the fake score alone, before", *(f"{plan.warmup:,}" for plan in plans), ""]]
    kinds = [kind for kind in (*KINDS, LAUNCHES) if any(time.kinds.get(kind) for time in times)]
    waits = [["it waits for its CPU, seconds", *(f"{time.host:.2f}" for time in times), ""]]
    return [
        ["", *(plan.stage for plan in plans), "both" if len(plans) == 2 else "together"],
        ["updates", *(f"{plan.updates:,}" for plan in plans), ""],
        *(warmup if any(plan.warmup for plan in plans) else []),
        ["seconds an update", *(f"{time.seconds:.2f}" for time in times), ""],
        *(
            [f"  {NAMES.get(kind, kind)}", *(f"{time.kinds.get(kind, 0) / time.busy:.0%}" for time in times), ""]
            for kind in kinds
        ),
        *(waits if any(time.waits_for_host for time in times) else []),
        ["of the data sheet: needed FLOPs (MFU)", *(f"{needed:.0%}" for needed, _ in mfus), ""],
        ["of the data sheet: executed FLOPs", *(f"{executed:.0%}" for _, executed in mfus), ""],
        ["hours", *(f"{each:,.1f}" for each in (*hours, sum(hours)))],
        ["GPU-hours", *(f"{each:,.1f}" for each in (*gpu_hours, sum(gpu_hours)))],
    ]


def _list_machines(config: Config, plan: StagePlan, card: Gpu, nodes: int) -> list[list[str]]:
    """The rows of a table: what an update takes on 1, 2, 4, ... machines."""
    processes, sharding = config.execution.processes, config.execution.sharding
    scaled = [
        scale_update(plan, card, nodes=each, processes=processes, sharding=sharding) for each in list_machines(nodes)
    ]
    return [
        ["GPUs", *(f"{each.ranks}" for each in scaled)],
        ["seconds an update", *(f"{each.seconds:.2f}" for each in scaled)],
        ["  networks", *(f"{each.compute:.2f}" for each in scaled)],
        ["  waiting for noise and prompts", *(f"{each.host:.2f}" for each in scaled)],
        ["  summing gradients", *(f"{each.gradients:.2f}" for each in scaled)],
        *([["  waiting for weights", *(f"{each.weights:.2f}" for each in scaled)]] if sharding != "none" else []),
        ["efficiency", *(f"{scaled[0].seconds / each.seconds:.0%}" for each in scaled)],
        ["memory of each GPU, GiB", *(f"{each.memory / GIB:.1f}" for each in scaled)],
        ["it fits", *("yes" if each.memory <= card.free else "no" for each in scaled)],
    ]
