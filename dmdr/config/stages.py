"""The stages of a run, once: their order, what each reads, and which settings name its result. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

StageName = Literal["prompts", "cold_start", "joint", "export", "evaluate"]
ModelName = Literal["student", "teacher", "naive teacher", "cold start"]
STAGES: tuple[StageName, ...] = get_args(StageName)  # in data order
MODELS: tuple[ModelName, ...] = get_args(ModelName)  # that a scorecard compares


@dataclass(frozen=True)
class Stage:
    """One stage.

    reads: the stages whose results it reads; `evaluate` reads also what its models are drawn from.
    settings: the settings that name its result, each with everything below it.
    trains: it trains the student. in_ranks: several processes may share its work.
    """

    reads: tuple[StageName, ...]
    settings: tuple[str, ...]
    trains: bool = False
    in_ranks: bool = False


_TRAINED = ("seed", "teacher.guidance_scale", "teacher.resolution", "student", "fake_score", "precision")
TABLE: dict[StageName, Stage] = {
    "prompts": Stage(reads=(), settings=("seed", "prompts")),
    "cold_start": Stage(reads=("prompts",), settings=(*_TRAINED, "cold_start"), trains=True, in_ranks=True),
    "joint": Stage(reads=("prompts", "cold_start"), settings=(*_TRAINED, "joint"), trains=True, in_ranks=True),
    "export": Stage(reads=("joint",), settings=("student", "teacher.resolution", "export")),
    "evaluate": Stage(
        reads=("prompts",),
        settings=("seed", "teacher", "student.steps", "evaluate", "joint.rl.rewards"),
        in_ranks=True,
    ),
}
DRAWN_FROM: dict[ModelName, StageName] = {"student": "export", "cold start": "cold_start"}  # the teacher needs no stage
TRAINING_STAGES = tuple(name for name, stage in TABLE.items() if stage.trains)


def list_reads(stage: StageName, models: Iterable[str]) -> tuple[StageName, ...]:
    """The stages whose results a stage reads; `models` are those that `evaluate` compares."""
    if stage != "evaluate":
        return TABLE[stage].reads
    return (*TABLE[stage].reads, *(origin for model, origin in DRAWN_FROM.items() if model in models))


def list_needed(stage: StageName, models: Iterable[str]) -> tuple[StageName, ...]:
    """Every stage that has to be sealed before this one runs, in data order."""
    needed = set(list_reads(stage, models))
    for earlier in reversed(STAGES):
        if earlier in needed:
            needed.update(TABLE[earlier].reads)
    return tuple(name for name in STAGES if name in needed)
