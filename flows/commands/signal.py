"""`dmdr signal`: how much of the reward's gradient an RL algorithm carries, where joint training begins.

It reads the run's sealed prompts and cold start, and writes nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.config.load import load_config
from dmdr.config.rl import Weighting
from dmdr.config.stages import list_reads
from dmdr.errors import ConfigError
from flows.commands.config_file import change_config, find_config
from stages.reports.scorecard_text import format_table
from stages.runtime.context import Context
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.teacher_folder import resolve_teacher

if TYPE_CHECKING:
    from dmdr.draws import Run
    from dmdr.planning.signal import Figure, Signal  # brings torch


def print_signal(path: str, *, updates: int, fit: int, store: str, changes: tuple[str, ...]) -> int:
    """Measure each row, print them as they are done, then the table; returns 0.

    Raises:
        ConfigError: the config has no RL.
        InputMissing: the prompts or the cold start of the run are not sealed.
    """
    with change_config(find_config(path), changes) as changed:
        config = resolve_teacher(load_config(changed), None, lambda size: None)
    if config.joint.rl is None:
        raise ConfigError("signal measures what RL learns from, and joint.rl is missing; set it")
    from dmdr.metrics.verifier import load_any_reward
    from dmdr.planning.signal import list_rows, measure_signal
    from dmdr.rewards.sources import list_sources

    with tempfile.TemporaryDirectory(prefix="dmdr-signal-") as cache:
        artifact, out = Artifact(store, config.run, "joint"), Path(cache, "out")  # read, and never written
        progress = Progress("signal")
        context = Context(config, artifact, out, Path(cache), progress, lambda: False)
        run = load_run(context)
        device = str(run.times.device)
        sources = list_sources(config, say=progress.say)
        differentiable = all(load_any_reward(name, device, sources).differentiable for name in config.joint.rl.rewards)
        rows, signals = list_rows(config.joint.rl, differentiable=differentiable), []
        if isinstance(config.joint.rl, Weighting):
            progress.say("weighting has no row: it hands the student no gradient of its own")
        for label, settings in rows.items():
            signals.append(measure_signal(run, label, settings, sources, updates, fit=fit, tick=progress.update))
            progress.say(f"{label}: {', '.join(map(format_figure, signals[-1].by_step.values()))}")
    what = "ReFL's gradient, state by state" if differentiable else "the other half of the batch, in the parameters"
    print(f"{config.run}: cosine with {what}; {updates} updates, ± the standard error\n")
    print(format_table(list_lines(signals, [float(each) for each in run.times])))
    print(
        f"\nfit: the share of the variance of fresh scores that a surrogate explains after {fit} updates; its weight "
        "is multiplied by it, if above 0."
    )
    print("A cosine c carries about c * c of the other gradient's signal to noise. - : no state there has a gradient.")
    return 0


def list_lines(signals: list[Signal], times: list[float]) -> list[list[str]]:
    """The rows of the table. times: of the student."""
    heads = [f"x0 at {time:.2f}" for time in times[:-1]]
    lines = [["", *heads, "fit", "seconds an update"]]
    for each in signals:
        fit = "-" if each.fit is None else f"{each.fit:+.2f}"
        lines.append([each.label, *map(format_figure, each.by_step.values()), fit, f"{each.seconds:.2g}"])
    return lines


def format_figure(figure: Figure) -> str:
    if figure.mean is None:
        return "-"
    return f"{figure.mean:+.3f}" + (f" ± {figure.error:.3f}" if figure.error is not None else "")


def load_run(context: Context) -> Run:
    """The joint stage of a run as it begins, with a reference of its student.

    Raises:
        any of USER_ERRORS: as the stage.
    """
    from dmdr.assembly.networks import assemble
    from dmdr.assembly.run import build_run
    from dmdr.assembly.stage_config import select_stage
    from dmdr.promptset import PromptSet
    from stages.runtime.device import pick_device
    from stages.runtime.prompt_inputs import PromptInputs

    config, device, inputs = context.config, pick_device(context.config), PromptInputs(context)
    stage, backbone = select_stage(config, "joint"), inputs.load_teacher(device)
    before = context.input("cold_start") if "cold_start" in list_reads("joint", (), config.stages) else None
    assembly = assemble(config, stage, backbone, before=before, device=device)
    if stage.rl is not None and not stage.rl.needs_reference():
        assembly.base.keep_reference()
    prompts, empty_prompt = inputs.open_encoded("train", backbone), PromptSet.unconditional(inputs.files)
    return build_run(config, stage, assembly, prompts=prompts, empty_prompt=empty_prompt)
