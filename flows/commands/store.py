"""`dmdr status`, `dmdr runs`, `dmdr promote`: looking into a store, and naming what is used from it."""

from __future__ import annotations

from pathlib import PurePosixPath

from dmdr.config.stages import STAGES
from stages.reports.scorecard_text import format_table
from stages.store.address import shorten
from stages.store.artifacts import Artifact
from stages.store.layout import CHECKPOINTS, CLAIM
from stages.store.runs import follow_name, list_promoted, list_runs, promote_run, read_latest


def print_status(run: str, store: str) -> int:
    """Print a line a stage: state, size, duration, address. Always 0: a run that never started is no error."""
    run = follow_name(store, run)
    rows = [["stage", "state", "size", "took", "address"]]
    for stage in STAGES:
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
    """Print a line a run: its teacher, how far it is, what its student scores, what it was promoted as. Always 0."""
    names: dict[str, list[str]] = {}
    for name, pointer in list_promoted(store).items():
        names.setdefault(pointer.run, []).append(name)
    rows = [["run", "teacher", "sealed", "scores on held-out measures (less the teacher's)", "promoted as"]]
    for run in list_runs(store):
        record = read_latest(store, run)
        promoted = ", ".join(names.get(run, []))
        if record is None:
            rows.append([run, "", "nothing yet", "", promoted])
            continue
        teacher = record.provenance.teacher or f"sha256 {shorten(record.inputs['teacher'])}"
        is_complete = record.stage == STAGES[-1]
        metrics = record.facts.get("metrics", []) if is_complete else []
        assert isinstance(metrics, list)
        scores = _format_scores(metrics)
        rows.append([run, teacher, "all" if is_complete else f"to {record.stage}", scores, promoted])
    print(format_table(rows) if len(rows) > 1 else f"no runs at {store}")
    return 0


def promote_result(run: str, name: str, store: str) -> int:
    """Let a name mean the export of a run, which `dmdr pull` follows. Always 0.

    Raises:
        ConfigError, InputMissing: as `stages.store.runs.promote`.
    """
    pointer = promote_run(store, run, name)
    before = "" if pointer.before is None else f", before {pointer.before.run}"
    print(f"{name} is the export of {run} now, fingerprint {shorten(pointer.fingerprint)}{before}")
    return 0


def _format_scores(metrics: list[dict]) -> str:
    """Of the student, or of the first model where there is none, on what no run trained on."""
    by_model: dict[str, dict[str, float]] = {}
    trained_on = {row["name"] for row in metrics if row["trained_on"]}
    for row in metrics:
        if row["name"] not in trained_on and row["mean"] is not None:
            by_model.setdefault(row["model"], {})[row["name"]] = row["mean"]
    model = "student" if "student" in by_model else next(iter(by_model), "")
    teacher = by_model.get("teacher", {}) if model == "student" else {}
    shown = [
        f"{name} {mean:.3f}" + (f" ({mean - teacher[name]:+.3f})" if name in teacher else "")
        for name, mean in by_model.get(model, {}).items()
    ]
    return (f"{model}: " if model not in ("", "student") else "") + ", ".join(shown)


def _describe_open(artifact: Artifact) -> str:
    names = artifact.place.names()
    whole = [
        PurePosixPath(name).parent for name in names if PurePosixPath(name).match(f"{CHECKPOINTS}/*/manifest.json")
    ]
    if whole:
        return f"open, {max(whole).name}"
    return "open" if CLAIM in names else "not started"


def _format_size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
