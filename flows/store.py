"""`dmdr status` and `dmdr pull`: looking into a store."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path, PurePosixPath

from dmdr.config import STAGES
from dmdr.errors import ConfigError
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


def pull(run: str, stage: str, folder: str, store: str) -> int:
    """Copy the verified files of a sealed stage to `folder`, which appears whole or not at all.

    Raises:
        ConfigError: the folder has something in it.
        InputMissing: the stage is not sealed.
        DataError: a file is damaged.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
    artifact = Artifact(store, run, stage)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as partial:
        files = Path(partial, "files")
        sealed = artifact.fetch(files)
        for name in artifact.record()["files"] if sealed != files else ():  # a local store gives its own folder
            copy = files / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sealed / name, copy)
        files.rename(target)
    print(f"{stage} of {run} is in {target}")
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
