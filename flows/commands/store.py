"""`dmdr status`, `dmdr runs` and `dmdr rm`: what a store holds, and the end of it."""

from __future__ import annotations

import sys
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, TypeAdapter

from dmdr.config.stages import STAGES, StageName, list_stages
from dmdr.errors import ConfigError
from stages.reports.run_cost import RunCost, sum_run
from stages.reports.scorecard_text import format_table
from stages.store.address import shorten
from stages.store.artifacts import Artifact
from stages.store.layout import CHECKPOINTS, CLAIM
from stages.store.pointers import list_decisions
from stages.store.records import Record
from stages.store.removal import plan_removal, remove
from stages.store.runs import find_run, list_promoted, list_runs


class Score(BaseModel):
    """What the record of an evaluation says about one model in one metric; None: the mean is not a number."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    model: str
    mean: float | None
    trained_on: bool


def print_status(run: str, store: str) -> int:
    """Print for each stage its state, size, duration and address; returns 0.

    Raises:
        InputMissing: there is no such run.
    """
    run = find_run(store, run)
    rows = [["stage", "state", "size", "took", "address"]]
    joint = Artifact(store, run, "joint").read_claim()
    for stage in list_stages(cold_start=joint is None or "cold_start" in joint.inputs):
        artifact = Artifact(store, run, stage)
        record = artifact.record()
        if record is None:
            rows.append([stage, _describe_open(artifact), "", "", artifact.address])
            continue
        size = sum(file.size for file in record.files.values())
        rows.append([stage, "sealed", _format_size(size), _format_time(record.provenance.duration_s), artifact.address])
    print(format_table(rows))
    return 0


def print_runs(store: str) -> int:
    """Print for each run its teacher, how far it is, its scores, its cost and its promoted names, the sum of costs, and
    what was decided about promotions; returns 0."""
    names: dict[str, list[str]] = {}
    for name, pointer in list_promoted(store).items():
        names.setdefault(pointer.run, []).append(name)
    rows = [["run", "teacher", "sealed", "scores on held-out measures (less the teacher's)", "cost", "promoted as"]]
    total = RunCost()
    runs = list_runs(store)
    for run in runs:
        cost = sum_run(store, run)
        record, total = cost.newest, total + cost
        promoted = ", ".join(names.get(run, []))
        if record is None:
            rows.append([run, "", "nothing yet", "", cost.describe(), promoted])
            continue
        teacher = record.provenance.teacher or f"sha256 {shorten(record.teacher_digest)}"
        is_complete = record.stage == STAGES[-1]
        scores = _format_scores(_read_scores(record)) if is_complete else ""
        rows.append([run, teacher, "all" if is_complete else f"to {record.stage}", scores, cost.describe(), promoted])
    print(format_table(rows) if len(rows) > 1 else f"no runs at {store}")
    if len(rows) > 2:
        print(f"all runs: {total.describe()}")
    for decision in list_decisions(store):
        if decision.run in runs:
            print(f"{decision.decided_at[:10]}: {decision.text}")
    return 0


def remove_result(run: str, stage: StageName | None, store: str, *, is_agreed: bool) -> int:
    """Remove a run, or a stage and what was made from it, after telling what depends on it; returns 0.

    is_agreed: do not ask.

    Raises:
        InputMissing: it is not there.
        ConfigError: it is running, or nobody can be asked.
    """
    removal = plan_removal(store, find_run(store, run), stage)
    print(f"{removal.store.rstrip('/')}/{removal.run}: {', '.join(removal.stages)}, {_format_size(removal.size)}")
    for name in removal.promoted:
        print(f"{name} is promoted to its export: dmdr pull {name} will fail until another run has that name")
    if removal.adopted:
        print(f"copied by {', '.join(removal.adopted)}, which keep their copies")
    if not is_agreed and not _ask("remove them?"):
        print("nothing was removed")
        return 0
    remove(removal)
    print("removed")
    return 0


def _ask(question: str) -> bool:
    """Whether the user says yes.

    Raises:
        ConfigError: nobody is there to answer.
    """
    if not sys.stdin.isatty():
        raise ConfigError("dmdr rm asks before it removes something, and nobody can answer here; give --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _read_scores(record: Record) -> list[Score]:
    return TypeAdapter(list[Score]).validate_python(record.facts.get("metrics", []))


def _format_scores(scores: list[Score]) -> str:
    """The means of the student, or of the first model where there is no student, in metrics that no run trained on."""
    held_out: dict[str, dict[str, float]] = {}
    trained_on = {score.name for score in scores if score.trained_on}
    for score in scores:
        if score.name not in trained_on and score.mean is not None:
            held_out.setdefault(score.model, {})[score.name] = score.mean
    model = "student" if "student" in held_out else next(iter(held_out), "")
    teacher = held_out.get("teacher", {}) if model == "student" else {}
    texts = [
        f"{name} {mean:.3f}" + (f" ({mean - teacher[name]:+.3f})" if name in teacher else "")
        for name, mean in held_out.get(model, {}).items()
    ]
    prefix = f"{model}: " if model not in ("", "student") else ""
    return prefix + ", ".join(texts)


def _describe_open(artifact: Artifact) -> str:
    names = artifact.place.names()
    checkpoints = [
        PurePosixPath(name).parent for name in names if PurePosixPath(name).match(f"{CHECKPOINTS}/*/manifest.json")
    ]
    if checkpoints:
        return f"open, {max(checkpoints).name}"
    return "open" if CLAIM in names else "not started"


def _format_size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
