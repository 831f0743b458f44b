"""How long the stages of a run took, from their records.

A record tells of the attempt that finished its stage: where earlier attempts were stopped, the whole took longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmdr.config.stages import MODELS, TRAINING_STAGES, list_needed, list_stages
from stages.store.records import Record


@dataclass(frozen=True)
class StageTime:
    """One stage. device: cuda or cpu; processes: ranks; seconds: by the clock; cpu_seconds: of rank 0.

    peak_mib: of its main memory. adopted_from: the run that made the result, if it was another one. made_from: the
    names of its inputs.
    """

    stage: str
    device: str
    processes: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    adopted_from: str | None
    made_from: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The stage in a sentence: "cold start"."""
        return self.stage.replace("_", " ")

    @property
    def effort(self) -> float:
        """Seconds of GPU, or of CPU on a machine without one, of all ranks."""
        return self.processes * (self.cpu_seconds if self.device == "cpu" else self.seconds)

    @property
    def effort_text(self) -> str:
        """Such as "3.2 GPU-hours"."""
        return format_effort(self.effort, self.device)

    @property
    def duration_text(self) -> str:
        return format_duration(self.seconds)

    @property
    def memory_text(self) -> str:
        return f"{self.peak_mib / 1024:.1f} GiB"


def list_stage_times(records: Mapping[str, Record]) -> list[StageTime]:
    """The times of sealed stages, in their order."""
    return [
        StageTime(
            stage,
            made.device,
            made.processes or 1,
            made.duration_s,
            made.cost.cpu_s,
            made.cost.peak_memory_mib,
            made.adopted_from,
            frozenset(inputs),
        )
        for stage, made, inputs in ((stage, record.provenance, record.inputs) for stage, record in records.items())
    ]


def select_training(model: str, times: Sequence[StageTime]) -> list[StageTime] | None:
    """The training stages that a model went through: none for a teacher.

    None where they are not known: of a third party's model, or where the time of one is missing.
    """
    if model not in MODELS or model == "start":  # what somebody else's training took is not known
        return None
    starts_at_joint = any(each.stage == "joint" and "start" in each.made_from for each in times)
    run = list_stages(cold_start=not starts_at_joint)
    needed = set(list_needed("evaluate", [model], run)).intersection(TRAINING_STAGES)
    found = [each for each in times if each.stage in needed]
    return found if len(found) == len(needed) else None


def sum_training(models: Sequence[str], times: Sequence[StageTime]) -> tuple[str, dict[str, float]] | None:
    """The device that training ran on, and model -> seconds of it, without models whose training is not known.

    None where no model was trained, or not on one kind of device.
    """
    selected = {model: select_training(model, times) for model in models}
    known = {model: stages for model, stages in selected.items() if stages is not None}
    devices = {each.device for stages in known.values() for each in stages}
    if len(devices) != 1:
        return None
    return devices.pop(), {model: sum(each.effort for each in stages) for model, stages in known.items()}


def format_duration(seconds: float) -> str:
    """A duration as people say it: "42 s", "7.5 min", "3.2 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def format_effort(seconds: float, device: str) -> str:
    """Seconds of a device as people count them: "0.3 GPU-hours", "12 CPU-minutes"."""
    kind = "CPU" if device == "cpu" else "GPU"
    if seconds < 60:
        return f"{seconds:.2g} {kind}-seconds"
    if seconds < 0.1 * 3600:
        return f"{seconds / 60:.2g} {kind}-minutes"
    return f"{seconds / 3600:.1f} {kind}-hours" if seconds < 100 * 3600 else f"{seconds / 3600:,.0f} {kind}-hours"


def total_effort(stages: Sequence[StageTime]) -> str | None:
    """The effort of all stages together; None where there are none, or not all used the same kind of device."""
    devices = {each.device for each in stages}
    if len(devices) != 1:
        return None
    return format_effort(sum(each.effort for each in stages), devices.pop())
