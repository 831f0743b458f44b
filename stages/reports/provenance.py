"""Where a result comes from, read from the records of the run's stages; for the model card and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dmdr.config.stages import STAGES, TRAINING_STAGES
from stages.reports.agreement import describe_agreement
from stages.reports.fake_warmup import WarmupFacts, describe_warmup
from stages.reports.stage_times import StageTime
from stages.runtime.context import Context
from stages.store.artifacts import Artifact
from stages.store.published_teachers import teacher_name
from stages.store.records import Record


@dataclass(frozen=True)
class Origin:
    """What a report says about where its run comes from.

    teacher: its name. base: the same as the paper calls it, None where the paper has no such model. lines: names and
    values, as `build_table` gives them. settings: every setting that names the result. times: of the sealed stages.
    """

    teacher: str
    base: str | None
    lines: list[tuple[str, str]]
    settings: dict[str, object]
    times: Sequence[StageTime] = ()


HALVED = {"rl": "RL's weight", "student": "the student's rate", "fake_score": "the fake score's rate"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class AlarmFacts(_Part):
    """An alarm: the figure `was` at update `since`, or with the teacher, and is `now` at `update`."""

    figure: str
    now: float
    update: int
    was: float
    since: int | None


class RecoveryFacts(_Part):
    """At `update` the stage went back to `back_to`, for these figures, with half of some settings; or ended there."""

    update: int
    back_to: int
    figures: tuple[str, ...]
    halved: tuple[str, ...]
    ends: bool = False


class StopFacts(_Part):
    """The watch ended the stage after this update."""

    after_update: int


class WatchFacts(_Part):
    """What the record of a training stage says of its watch, as far as reports show it.

    reward: the watched one, if there is one. exported: the update whose EMA is the student. kept: other updates whose
    EMA is sealed. alarms: those of the course that was kept; those that led to recoveries stand there.
    """

    reward: str | None
    export: Literal["last", "best"]
    exported: int
    alarms: tuple[AlarmFacts, ...]
    stopped: StopFacts | None = None
    kept: tuple[int, ...] = ()
    recoveries: tuple[RecoveryFacts, ...] = ()


def read_records(context: Context) -> dict[str, Record]:
    """The records of this run's sealed stages, in data order."""
    records = {stage: Artifact(context.artifact.store, context.artifact.run, stage).record() for stage in STAGES}
    return {stage: record for stage, record in records.items() if record is not None}


def collect_settings(sealed: Mapping[str, Record], own: Mapping[str, object]) -> dict[str, object]:
    """Every setting that names the result: the identities of the sealed stages, and `own` of the running stage."""
    return {**{name: value for record in sealed.values() for name, value in record.identity.items()}, **own}


def describe_control(settings: Mapping[str, object]) -> str | None:
    """What to know of a student whose RL had no signal; None of any other. settings: of `collect_settings`."""
    shuffled = [key for stage in TRAINING_STAGES if settings.get(key := f"{stage}.rl.shuffled")]
    if not shuffled:
        return None
    return f"{shuffled[0]} dealt the rewards at random: this student is a control to compare with, not one to deploy"


def describe_watch(facts: WatchFacts) -> str:
    """What the watch saw in a training stage, and what followed from it."""
    alarms = [describe_alarm(alarm) for alarm in facts.alarms]
    alarms += [describe_recovery(recovery) for recovery in facts.recoveries]
    stopped = f"; stopped after update {facts.stopped.after_update}" if facts.stopped else ""
    chosen = f", chosen by {facts.reward} on training prompts" if facts.export == "best" else ""
    kept = f"; kept beside it: {', '.join(map(str, sorted(facts.kept)))}" if facts.kept else ""
    return f"{'; '.join(alarms) or 'silent'}{stopped}; the student is the EMA of update {facts.exported}{chosen}{kept}"


def describe_alarm(alarm: AlarmFacts) -> str:
    since = "the teacher's" if alarm.since is None else f"at {alarm.since}"
    return f"{alarm.figure} {alarm.now:.4g} at update {alarm.update}, from {alarm.was:.4g} {since}"


def describe_recovery(recovery: RecoveryFacts) -> str:
    """Why a stage went back, where to, and what it did there."""
    then = "ended there" if recovery.ends else f"halved {' and '.join(HALVED[part] for part in recovery.halved)}"
    return f"{', '.join(recovery.figures)} at update {recovery.update}: back to update {recovery.back_to}, {then}"


def build_table(context: Context) -> list[tuple[str, str]]:
    """Names and values for the report."""
    sealed, path = read_records(context), context.config.teacher.path
    prompts = sealed["prompts"]
    rows = [
        ("run", context.artifact.run),
        ("teacher", f"{teacher_name(path)}, sha256 {prompts.teacher_digest}"),
        ("prompts", ", ".join(_show_fact(*fact) for fact in prompts.facts.items())),
    ]
    control = describe_control(collect_settings(sealed, {}))
    if control is not None:
        rows.append(("control", control))
    for record in sealed.values():
        if "start" in record.inputs and record.stage != "evaluate":
            rows.insert(2, ("start", f"{record.provenance.start}, sha256 {record.inputs['start']}"))
    for stage, record in sealed.items():
        provenance = record.provenance
        rows.append((stage, f"dmdr {provenance.code['version']}, fingerprint {record.fingerprint}"))
        if isinstance(agreement := record.facts.get("agreement"), float):
            rows.append(("frozen base", describe_agreement(record.identity["frozen_base"], agreement)))
        if "fake_warmup" in record.facts:
            rows.append(("fake score", describe_warmup(WarmupFacts.model_validate(record.facts["fake_warmup"]))))
        if "watch" in record.facts:
            rows.append((f"watch of {stage}", describe_watch(WatchFacts.model_validate(record.facts["watch"]))))
    latest = list(sealed.values())[-1].provenance.code
    libraries = {name: version for name, version in latest.items() if name not in ("version", "sources")}
    rows.append(("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items())))
    return rows


def _show_fact(name: str, value: object) -> str:
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
