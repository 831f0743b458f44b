"""`dmdr tune`: short runs on a grid of learning rates and update ratios, judged alike, and the cell to take.

1. It reads the run's sealed prompts, and for joint training its cold start. It writes into a folder of this machine
   only, so that the run stays as it is.
2. Each cell is a file there, written when the cell is done. The same command again runs those that are missing.
3. `dmdr.planning.stability` has the rule by which a cell is recommended.
4. RL acts in all of a cell, whatever `rl.start` and `rl.ramp` say: a short run would end before.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.reward_weights import OF_REWARD
from dmdr.config.run import Config
from dmdr.config.stages import list_reads
from dmdr.errors import ConfigError, DataError, Stopped
from dmdr.planning.stability import (
    Cell,
    CellResult,
    Look,
    find_drift,
    list_cells,
    read_own_cell,
    recommend,
    write_config_lines,
)
from flows.commands.config_file import change_config, find_config
from stages.runtime.context import Context
from stages.runtime.progress import Progress, format_seconds
from stages.runtime.remaining import count_update, count_warmup
from stages.store.address import find_differing_keys, normalise_json
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.records import Json
from stages.store.teacher_folder import resolve_teacher

if TYPE_CHECKING:
    from dmdr.planning.short_runs import ShortRuns  # brings torch

Kind = TypeVar("Kind", bound=BaseModel)
TunedStage = Literal["cold_start", "joint"]
READERS: dict[str, Callable[[str], float]] = {"student": float, "fake": float, "ratio": int}  # axis -> its values
ABOUT, BOUNDS, RESULT, MAP, CELLS = "about.json", "bounds.json", "tune.json", "map.png", "cells"


@dataclass(frozen=True)
class Grid:
    """The values of each axis; without any, the grid around the config's own values."""

    student: tuple[float, ...] = ()
    fake: tuple[float, ...] = ()
    ratio: tuple[int, ...] = ()


@dataclass(frozen=True)
class TuneOptions:
    """The options of `dmdr tune`. out: folder of the results; None: tuning/RUN-STAGE."""

    stage: TunedStage
    grid: Grid
    updates: int
    out: str | None
    store: str
    changes: tuple[str, ...]


class Bounds(BaseModel):
    """What every cell is compared with. seconds: of one update with the config's own values."""

    model_config = ConfigDict(frozen=True)

    start: Look
    teacher: Look
    seconds: float


def tune_config(path: str, options: TuneOptions) -> int:
    """Run the cells that are missing, then print the table, the map's place and the lines to paste; returns 0.

    Raises:
        ConfigError: no held-out reward judges, or the folder holds another tune.
        InputMissing: the prompts or the cold start of the run are not sealed.
        DataError: a file of the folder is damaged.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Stopped.exit_code))
    with change_config(find_config(path), options.changes) as changed:
        config = resolve_teacher(load_config(changed), None, lambda size: None)
    run, stage, grid = config.run, options.stage, options.grid
    config.require_stage(stage, f"--stage {stage}")
    training = config.training_of(stage)
    cells = list_cells(
        read_own_cell(training, config.seed),
        student_rates=grid.student,
        fake_rates=grid.fake,
        ratios=grid.ratio,
    )
    reward = find_reward(config)
    inputs = fingerprint_inputs(config, stage, options.store, run)
    folder = Path(options.out or f"tuning/{run}-{stage}")
    updates = min(options.updates, training.updates)
    given = {f"input {name}": digest for name, digest in inputs.items()}
    claim_folder(folder, {**list_fixed(config, stage), "reward": reward, "updates": updates, **given})
    if not all(read_result(folder, cell) for cell in cells):
        with tempfile.TemporaryDirectory(prefix="dmdr-tune-") as cache:
            artifact, out = Artifact(options.store, run, stage), Path(cache, "out")  # read, and never written
            context = Context(config, artifact, out, Path(cache), Progress("tune"), lambda: False)
            run_cells(load_runs(context, stage, reward), cells, folder, updates=updates)
    return show(config, options, [each for cell in cells if (each := read_result(folder, cell))], folder)


def list_fixed(config: Config, stage: TunedStage) -> Json:
    """The settings of a stage that all cells share. Those that cells differ in are not among them."""
    training = config.training_of(stage)
    roles = [role for role in ("student", "fake_score") if getattr(training, role).final_learning_rate is None]
    varied = {f"{stage}.fake_updates", *(f"{stage}.{role}.learning_rate" for role in roles)}
    return {key: value for key, value in normalise_json(identity(config, stage)).items() if key not in varied}


def find_reward(config: Config) -> str:
    """The held-out reward that judges: the watched one, or the first of evaluation that training does not use.

    Raises:
        ConfigError: there is none.
    """
    if watched := config.list_watched("joint"):
        return watched[0]
    trained = config.trained_rewards.keys()
    for name in config.evaluate.metrics:
        if (name in OF_REWARD or name in config.rewards) and name not in trained:
            return name
    raise ConfigError(
        "tune judges by a reward that training does not use, and neither joint.watch nor evaluate.metrics names "
        f"one; add one of {', '.join(sorted(OF_REWARD.keys() - trained))} to evaluate.metrics"
    )


def claim_folder(folder: Path, about: Json) -> None:
    """Write down what the cells of a folder are of, or check that they are of the same.

    Raises:
        ConfigError: they are of something else, or the folder cannot be one of results.
    """
    file = folder / ABOUT
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    if not file.is_file():
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
        write_json(file, about)
        return
    there = read_json(file)
    if differing := find_differing_keys(there, about):
        key = differing[0]
        raise ConfigError(
            f"{folder} holds the cells of another tune: {key} is {there.get(key)!r} there, {about.get(key)!r} here; "
            "give another folder with --out, or delete that one"
        )


def load_runs(context: Context, stage: TunedStage, reward: str) -> ShortRuns:
    """Load the teacher, the start, and the rewards.

    Raises:
        any of USER_ERRORS: as the stage.
    """
    from dmdr.assembly.networks import assemble
    from dmdr.assembly.stage_config import select_stage
    from dmdr.metrics.verifier import load_any_reward
    from dmdr.planning.short_runs import ShortRuns
    from dmdr.promptset import PromptSet
    from dmdr.rewards.sources import list_sources
    from stages.runtime.device import pick_device
    from stages.runtime.prompt_inputs import PromptInputs

    config, device, inputs = context.config, pick_device(context.config), PromptInputs(context)
    settings, backbone = select_stage(config, stage), inputs.load_teacher(device)
    goes_on = "cold_start" in list_reads(stage, (), config.stages)
    before = context.input("cold_start") if goes_on else None
    assembly = assemble(config, settings, backbone, before=before, device=device)
    return ShortRuns(
        config,
        settings,
        assembly,
        prompts=inputs.open_encoded("train", backbone),
        empty_prompt=PromptSet.unconditional(inputs.files),
        reward=load_any_reward(reward, device, list_sources(config)),
    )


def run_cells(runs: ShortRuns, cells: Sequence[Cell], folder: Path, *, updates: int) -> None:
    """Say what it costs, then run the cells that are missing, each into its file."""
    bounds = read_bounds(runs, cells[0], folder)
    missing = [cell for cell in cells if read_result(folder, cell) is None]
    own = count_update(runs.config, runs.stage.training)

    def expect(cell: Cell) -> float:
        changed = runs.stage.training.model_copy(update={"fake_updates": cell.fake_updates})
        work = updates * count_update(runs.config, changed) + runs.stage.fake_warmup * count_warmup(changed)
        return bounds.seconds * work / own

    left = sum(map(expect, missing))
    print(
        f"{len(missing)} of {len(cells)} cells to run, {updates} updates each: about {format_seconds(left)} by the "
        f"{bounds.seconds:.2g} s that an update took here; stop at any time, the same command goes on",
        file=sys.stderr,
        flush=True,
    )
    progress = Progress("tune")
    for number, cell in enumerate(missing):

        def tick(done: int, *, before: int = number * updates) -> None:
            progress.update(before + done, len(missing) * updates)

        def leave(look: Look) -> str:
            return find_drift(look, bounds.start, bounds.teacher)

        result = runs.run(cell, updates, tick=tick, find_drift=leave)
        write_json(folder / CELLS / f"{cell.name}.json", result.model_dump())
        told = f"ended: {result.ended}" if result.look is None else f"held-out reward {result.look.reward:.4f}"
        progress.say(f"{cell.describe()}, seed {cell.seed}: {told}")


def read_bounds(runs: ShortRuns, own: Cell, folder: Path) -> Bounds:
    """What the cells are compared with: measured once, then read."""
    from dmdr.planning.trial import try_update

    file = folder / BOUNDS
    if file.is_file():
        return parse(Bounds, file)
    run, state = runs.begin(own)
    start, teacher = runs.look(run), runs.look_at_teacher(run)
    trial = try_update(run, state, limit=float("inf"))
    bounds = Bounds(start=start, teacher=teacher, seconds=trial.seconds)
    write_json(file, bounds.model_dump())
    return bounds


def show(config: Config, options: TuneOptions, results: list[CellResult], folder: Path) -> int:
    """Print and write what came out."""
    from stages.reports.stability_map import draw_map, format_cells

    bounds = parse(Bounds, folder / BOUNDS)
    verdict = recommend(results, bounds.start, bounds.teacher)
    lines = write_config_lines(options.stage, verdict.recommended)
    title = f"{config.run}, {options.stage}: {options.updates} updates each, judged by {find_reward(config)}"
    draw_map(results, bounds.start, verdict, title=title).save(folder / MAP, optimize=True)
    write_json(
        folder / RESULT,
        {
            "recommended": verdict.recommended.model_dump(),
            "why": verdict.why,
            "lead": verdict.lead,
            "low": verdict.low,
            "config": lines,
            "start": bounds.start.model_dump(),
            "teacher": bounds.teacher.model_dump(),
            "cells": [{**result.model_dump(), "unstable": verdict.unstable.get(result.cell, "")} for result in results],
        },
    )
    print(format_cells(results, bounds.start, bounds.teacher, verdict))
    print(f"\nrecommended: {verdict.recommended.describe()}: {verdict.why}\n\n{lines}\n")
    print(f"map: {folder / MAP}\nfigures: {folder / RESULT}")
    return 0


def read_result(folder: Path, cell: Cell) -> CellResult | None:
    """The result of a cell; None if it has not been run."""
    file = folder / CELLS / f"{cell.name}.json"
    return parse(CellResult, file) if file.is_file() else None


def write_json(file: Path, data: object) -> None:
    """Write a file whole or not at all."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(half, file)


def read_json(file: Path) -> Json:
    """
    Raises:
        DataError: it is not JSON.
    """
    with suppress(ValueError):
        data = json.loads(file.read_bytes())
        if isinstance(data, dict):
            return data
    raise DataError(f"{file} is damaged; delete it, and the same command makes it again")


def parse(kind: type[Kind], file: Path) -> Kind:
    """
    Raises:
        DataError: the file is not what `write_json` wrote.
    """
    try:
        return kind.model_validate(read_json(file))
    except ValidationError as error:
        raise DataError(f"{file} is damaged; delete it, and the same command makes it again") from error


def parse_grid(texts: Sequence[str]) -> Grid:
    """The grid of texts such as "student=1e-5,3e-5".

    Raises:
        ConfigError: an axis is unknown or stands twice, or a value is no number above 0.
    """
    axes: dict[str, tuple[float, ...]] = {}
    for text in texts:
        axis, _, values = text.partition("=")
        if axis not in READERS or axis in axes:
            raise ConfigError(f"--grid {text} is not one of student=R,R, fake=R,R and ratio=K,K, each at most once")
        try:
            axes[axis] = tuple(map(READERS[axis], values.split(",")))
        except ValueError as error:
            kind = "whole numbers" if axis == "ratio" else "numbers"
            raise ConfigError(f"--grid {text} is no list of {kind}; write it as {axis}=1,2") from error
        if not all(0 < value < math.inf for value in axes[axis]):
            raise ConfigError(f"--grid {text} has a value that is not above 0; leave it out")
    return Grid(axes.get("student", ()), axes.get("fake", ()), tuple(map(int, axes.get("ratio", ()))))
