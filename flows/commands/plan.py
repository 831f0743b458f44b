"""`dmdr plan`: what a config needs, on the terminal, before anyone pays."""

from __future__ import annotations

import sys

from dmdr.config.load import load_config
from dmdr.planning.gpus import GIB, GPUS, SHARE, advise
from stages.reports.scorecard_text import format_table

TRAINED = ("cold_start", "joint")


def print_plan(path: str, gpu: str) -> int:
    """Print parameters, memory, work and hours of both training stages on that GPU, and what to change where it does
    not fit. Always 0: a plan that does not fit is an answer."""
    from dmdr.planning import plan as planning

    config, card = load_config(path), GPUS[gpu]
    found = []
    for stage in TRAINED:
        _show_progress(f"{stage}: building it without weights")
        found.append(
            planning.plan_stage(config, stage, say=lambda part, stage=stage: _show_progress(f"{stage}: {part}"))
        )
    _show_progress("")
    print(f"{config.run}: {config.teacher.path}\n{found[0].ranks} x {card.name}, {config.precision}\n")
    print(_parameters(found[0]))
    unit, size = ("GiB", GIB) if max(stage.peak for stage in found) >= GIB else ("MiB", 2**20)
    print(f"\nmemory of each GPU, {unit} ({card.free / GIB:.1f} GiB are free for tensors)")
    print(format_table(_memory(found, size)))
    print("\nwork of one update, forward-equivalents (F = one forward of the base on the whole batch)")
    print(format_table(_work(found)))
    print(f"\nat {SHARE:.0%} of the {card.rate(config.precision) / 1e12:,.0f} TFLOP/s of its data sheet")
    print(format_table(_hours(found, card, config.precision)))
    print("prompts, export and evaluation come to it; so do checkpoints and looks of the watch.\n")
    for line in advise(config, found, card):
        print(line)
    return 0


def _show_progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _parameters(stage) -> str:
    return (
        f"parameters: teacher {stage.teacher / 1e6:,.1f} M, trained of the student "
        f"{stage.trained['student'] / 1e6:,.1f} M, of the fake score {stage.trained['fake_score'] / 1e6:,.1f} M"
    )


def _memory(stages, size: int) -> list[list[str]]:
    names = list(dict.fromkeys(name for stage in stages for name, held in stage.parts.items() if held))
    rows = [["", *(stage.stage for stage in stages)]]
    rows += [[name, *(f"{stage.parts.get(name, 0) / size:.2f}" for stage in stages)] for name in names]
    rows.append(["an update beside it, at most", *(f"{stage.update / size:.2f}" for stage in stages)])
    rows.append(["together", *(f"{stage.peak / size:.2f}" for stage in stages)])
    if any(stage.load for stage in stages):
        rows.append(["while it is loaded", *(f"{stage.load / size:.2f}" for stage in stages)])
    return rows


def _work(stages) -> list[list[str]]:
    names = list(dict.fromkeys(name for stage in stages for name, work in stage.work.items() if work))
    rows = [["", *(stage.stage for stage in stages)]]
    rows += [[name, *(f"{stage.work.get(name, 0) / stage.forward:.2f}" for stage in stages)] for name in names]
    rows.append(["without the reward", *(f"{stage.equivalents:.2f}" for stage in stages)])
    rows.append(["nothing computed twice", *(f"{stage.floor:.2f}" for stage in stages)])
    rows.append(["TFLOP an update", *(f"{stage.flops / 1e12:,.1f}" for stage in stages)])
    return rows


def _hours(stages, card, precision: str) -> list[list[str]]:
    rows = [["", *(stage.stage for stage in stages), "both"]]
    hours = [card.hours(stage, precision) for stage in stages]
    rows.append(["updates", *(f"{stage.updates:,}" for stage in stages), ""])
    seconds = [3600 * each / stage.updates for each, stage in zip(hours, stages, strict=True)]
    rows.append(["seconds an update", *(f"{each:.2f}" for each in seconds), ""])
    rows.append(["hours", *(f"{each:,.1f}" for each in (*hours, sum(hours)))])
    each_gpu = [each * stage.ranks for each, stage in zip(hours, stages, strict=True)]
    rows.append(["GPU-hours", *(f"{each:,.1f}" for each in (*each_gpu, sum(each_gpu)))])
    return rows
