"""`dmdr status`: looking into a store."""

from __future__ import annotations

from pathlib import PurePosixPath

from dmdr.config import STAGES
from flows.scorecard import table
from stages.artifacts import Artifact
from stages.layout import CHECKPOINTS, CLAIM


def status(run: str, store: str) -> int:
    """Print a line a stage: state, size, duration, address. Always 0: a run that never started is no error."""
    rows = [["stage", "state", "size", "took", "address"]]
    for stage in STAGES:
        artifact = Artifact(store, run, stage)
        record = artifact.record()
        if record is None:
            rows.append([stage, _unsealed(artifact), "", "", artifact.address])
            continue
        size = sum(file["size"] for file in record["files"].values())
        rows.append([stage, "sealed", _megabytes(size), _time(record["duration_s"]), artifact.address])
    print(table(rows))
    return 0


def _unsealed(artifact: Artifact) -> str:
    names = artifact.place.names()
    whole = [
        PurePosixPath(name).parent for name in names if PurePosixPath(name).match(f"{CHECKPOINTS}/*/manifest.json")
    ]
    if whole:
        return f"open, {max(whole).name}"
    return "open" if CLAIM in names else "not started"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
