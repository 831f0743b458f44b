"""How a start was made to sample, where its files say so, beside how the student of a config will sample.

1. The config decides. It is compared with what the start's files say, because a few-step model draws well only at its
   own times: the metadata and provenance.json of our exports, and the scheduler that lies beside any start.
2. An export of ours says exactly how it samples. Where joint training begins there at once and the config leaves its
   own sampling unsaid, another one is refused, with the lines to add. Everything else draws one line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dmdr.errors import ConfigError, DataError
from dmdr.teacher.json_file import read_object
from dmdr.teacher.start_files import KEY, StartSource
from dmdr.teacher.start_headers import StartHeader

RENOISE = {"LCMScheduler": True, "TCDScheduler": True, "EulerDiscreteScheduler": False, "DDIMScheduler": False}
FLOW = "FlowMatchEulerDiscreteScheduler"
SAME = 1.0  # of a thousand: times that are closer are the same
SAME_SHIFT = 1e-3
TIMES = TypeAdapter(tuple[float, ...])


@dataclass(frozen=True)
class Sampling:
    """How a few-step model samples; None: not known.

    timesteps: as its network is told them. renoises: with fresh noise, or by deterministic steps. shift: of a flow
    model's times. predicts: epsilon or v_prediction, of a denoising model. is_ours: an export of DMDR says so.
    """

    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    renoises: bool | None = None
    shift: float | None = None
    predicts: str | None = None
    is_ours: bool = False


class _Exported(BaseModel):
    """What provenance.json of an export says of the student's sampling."""

    model_config = ConfigDict(extra="ignore")

    class Student(BaseModel):
        model_config = ConfigDict(extra="ignore")
        steps: int
        timesteps: tuple[float, ...] | None = None
        shift: float | None = None

    student: Student


def read_sampling(source: StartSource, header: StartHeader) -> Sampling:
    """How a start samples, as far as its files say so. What is no number in them is unknown: others wrote them."""
    metadata = header.metadata
    scheduler = {} if source.scheduler is None else read_object(source.scheduler)
    exported, ours = _read_provenance(source), False
    steps, timesteps = (None, None) if exported is None else (exported.steps, exported.timesteps)
    try:
        if "dmdr.steps" in metadata:
            steps, timesteps = int(metadata["dmdr.steps"]), TIMES.validate_json(metadata["dmdr.timesteps"])
            scheduler = {"_class_name": metadata["dmdr.scheduler"], **json.loads(metadata["dmdr.scheduler_config"])}
            ours = True
    except (KeyError, ValueError):
        pass  # somebody changed the metadata
    kind, predicts = scheduler.get("_class_name"), scheduler.get("prediction_type")
    is_flow, is_ours = kind == FLOW, ours or exported is not None
    return Sampling(
        steps=steps,
        timesteps=timesteps,
        renoises=bool(scheduler.get("stochastic_sampling")) if is_flow else RENOISE.get(str(kind)),
        shift=(exported.shift if exported else None) if is_ours else _read_shift(scheduler),
        predicts=str(predicts) if predicts is not None and not is_flow else None,
        is_ours=is_ours,
    )


def _read_provenance(source: StartSource) -> _Exported.Student | None:
    """The student of the export that the start is a form of; None: it is none of ours."""
    try:
        return None if source.provenance is None else _Exported.model_validate(read_object(source.provenance)).student
    except (ValidationError, DataError):
        return None  # of another program


def _read_shift(scheduler: dict[str, object]) -> float | None:
    """The shift of somebody's flow scheduler; None: it has none, or one that depends on the size of the image."""
    shift = scheduler.get("shift")
    moves = scheduler.get("use_dynamic_shifting") or scheduler.get("shift_terminal")
    return (
        float(shift) if scheduler.get("_class_name") == FLOW and isinstance(shift, int | float) and not moves else None
    )


def compare_sampling(path: str, ours: Sampling, theirs: Sampling, *, refuses: bool) -> list[str]:
    """A line for what the start's files say otherwise than the config.

    Args:
        path: of the start. ours: of the config's student, all of it known.
        refuses: whether an export of ours that samples otherwise is refused.

    Raises:
        DataError: the start predicts something else than the teacher.
        ConfigError: as `refuses` says.
    """
    if theirs.predicts is not None and ours.predicts is not None and theirs.predicts != ours.predicts:
        raise DataError(
            f"{KEY} {path} predicts {theirs.predicts} (scheduler_config.json) and the teacher {ours.predicts}; give a "
            "start of the teacher's kind"
        )
    if theirs.steps is not None and theirs.steps != ours.steps:
        return [f"{KEY} {path} was made for {theirs.steps} steps, and student.steps is {ours.steps}"]
    lines = _list_changes(ours, theirs)
    if not lines:
        return []
    message = f"{KEY} {path} samples otherwise than this config: {', '.join(lines)} would sample as it does"
    if refuses and theirs.is_ours:
        raise ConfigError(f"{message}; set that, or give student.timesteps of your own")
    return [message]


def _list_changes(ours: Sampling, theirs: Sampling) -> list[str]:
    """The settings that would make the config sample as the start does."""
    changes = []
    if theirs.timesteps is not None and ours.timesteps is not None and _differ(theirs.timesteps, ours.timesteps):
        changes.append(f"student.timesteps: [{', '.join(f'{time:g}' for time in theirs.timesteps)}]")
    if theirs.timesteps is None and _shifts_differ(theirs.shift, ours.shift):
        changes.append(f"student.shift: {theirs.shift:g}")
    if theirs.renoises is not None and theirs.renoises != ours.renoises and ours.steps != 1:
        changes.append(f"student.eta: {1 if theirs.renoises else 0}")
    return changes


def _shifts_differ(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) > SAME_SHIFT


def _differ(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and any(abs(a - b) > SAME for a, b in zip(one, other, strict=True))
