"""The stages of a run: their order, what each reads, and which settings identify its result. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

StageName = Literal["prompts", "cold_start", "joint", "export", "evaluate"]
ModelName = Literal["student", "teacher", "naive teacher", "cold start", "start"]
STAGES: tuple[StageName, ...] = get_args(StageName)  # in data order; a config may lack the cold start (`Config.stages`)
MODELS: tuple[ModelName, ...] = get_args(ModelName)  # the models that a scorecard can compare


@dataclass(frozen=True)
class Stage:
    """One stage.

    reads: the stages whose results it reads. `evaluate` also reads the results that hold the models it compares.
    settings: the settings that identify its result; a section stands for all settings in it.
    trains: whether it trains the student. in_ranks: whether several processes can share its work.
    """

    reads: tuple[StageName, ...]
    settings: tuple[str, ...]
    trains: bool = False
    in_ranks: bool = False


_TRAINED = ("seed", "teacher.guidance_scale", "teacher.resolution", "student", "fake_score", "precision", "frozen_base")
TABLE: dict[StageName, Stage] = {
    "prompts": Stage(reads=(), settings=("seed", "prompts", "teacher.unconditional")),
    "cold_start": Stage(reads=("prompts",), settings=(*_TRAINED, "cold_start"), trains=True, in_ranks=True),
    "joint": Stage(reads=("prompts", "cold_start"), settings=(*_TRAINED, "joint"), trains=True, in_ranks=True),
    "export": Stage(reads=("joint",), settings=("student", "teacher.resolution", "export")),
    "evaluate": Stage(
        reads=("prompts",),
        settings=("seed", "teacher", "student.steps", "evaluate", "cold_start.rl.rewards", "joint.rl.rewards"),
        in_ranks=True,
    ),
}
# model -> the stage whose result holds it; the teacher and the student's start need no stage
DRAWN_FROM: dict[ModelName, StageName] = {"student": "export", "cold start": "cold_start"}
TRAINING_STAGES = tuple(name for name, stage in TABLE.items() if stage.trains)


def list_compared(*, cold_start: bool) -> tuple[ModelName, ...]:
    """The models that a scorecard compares where the config names none. cold_start: whether the run has one."""
    return tuple(name for name in MODELS if name != ("start" if cold_start else "cold start"))


def list_stages(*, cold_start: bool) -> tuple[StageName, ...]:
    """The stages of a run, in data order. cold_start: whether it has one."""
    return tuple(name for name in STAGES if cold_start or name != "cold_start")


def list_until(last: StageName | None, stages: tuple[StageName, ...] = STAGES) -> tuple[StageName, ...]:
    """The stages of a run up to `last`, in data order; None: all. stages: those of the run."""
    return stages if last is None else tuple(name for name in stages if STAGES.index(name) <= STAGES.index(last))


def list_reads(
    stage: StageName, models: Iterable[str], stages: tuple[StageName, ...] = STAGES
) -> tuple[StageName, ...]:
    """The stages whose results a stage reads. models: those that `evaluate` compares. stages: those of the run."""
    reads = TABLE[stage].reads
    if stage == "evaluate":
        reads = (*reads, *(origin for model, origin in DRAWN_FROM.items() if model in models))
    return tuple(name for name in reads if name in stages)


def list_needed(
    stage: StageName, models: Iterable[str], stages: tuple[StageName, ...] = STAGES
) -> tuple[StageName, ...]:
    """All stages of a run that must be sealed before this one can run, in data order."""
    needed = set(list_reads(stage, models, stages))
    for earlier in reversed(STAGES):
        if earlier in needed:
            needed.update(TABLE[earlier].reads)
    return tuple(name for name in stages if name in needed)
