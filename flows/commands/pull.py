"""`dmdr pull`: a sealed stage, or one form of an export, into a folder that appears whole."""

from __future__ import annotations

import fcntl
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmdr.config.forms import FORMS
from dmdr.errors import ConfigError, DataError, InputMissing, StoreError
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.download import download
from stages.store.runs import follow_name

STOPPED = 75
WITH_EACH = ("provenance.json", "SHA256SUMS")  # what comes with a form
MEGABYTE = 10**6


def pull_stage(run: str, stage: str, folder: str, store: str, form: str | None) -> int:
    """Copy the files of a sealed stage to `folder`, each verified; a pull that was cut off goes on from what it has.

    run: its name, or what it was promoted as. form: of an export, only this one. Until the copy is whole its files lie
    in .FOLDER.partial beside it. Returns the exit code.

    Raises:
        ConfigError: the folder has something in it, or only an export has forms.
        InputMissing: the stage is not sealed, or was not exported in this form.
        DataError: a file is missing or damaged, or the record is of another run or stage.
        StoreError: the store or the disk refuses, or another pull is writing to this folder.
    """
    target = Path(folder).absolute()
    if form and stage != "export":
        raise ConfigError(f"--form is of the stage export, not of {stage}; leave it out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
    name, run = run, follow_name(store, run)
    artifact = Artifact(store, run, stage)
    if name != run:
        print(f"{name} is run {run}")
    sizes = {name: artifact.sealed().files[name].size for name in select_files(artifact, form)}
    total, progress = sum(sizes.values()), Progress("pulled megabytes")

    def told(here: int) -> None:
        whole = math.ceil(total / MEGABYTE)
        progress.update(whole if here == total else here // MEGABYTE, whole)

    with lock_folder(target.parent / f".{target.name}.partial") as partial:
        try:
            download(artifact, sizes, partial, told)
        except (ConfigError, DataError, OSError) as error:
            kinds = (ConfigError, DataError, InputMissing)
            kind = next((each for each in kinds if isinstance(error, each)), StoreError)
            raise kind(f"{error}; {_describe_missing(partial, sizes)}") from error
        except KeyboardInterrupt:
            print(f"dmdr: stopped; {_describe_missing(partial, sizes)}; repeat the command to go on", file=sys.stderr)
            return STOPPED
        for path in sorted(partial.rglob("*"), reverse=True):  # of another pull to this folder
            if path.is_file() and path.relative_to(partial).as_posix() not in sizes:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        partial.rename(target)
    print(f"{form or stage} of {run} is in {target}")
    return 0


def select_files(artifact: Artifact, form: str | None) -> list[str]:
    """The names of the files to copy; raises as `pull` does."""
    record = artifact.sealed()
    if (record.run, record.stage) != (artifact.run, artifact.stage):
        raise DataError(
            f"{artifact.address} has the record of {record.stage} of run {record.run}: it was copied there; pull "
            "it under its own name"
        )
    names = list(record.files)
    if form is None:
        return names
    there = [each for each in FORMS if any(name.startswith(f"{each}/") for name in names)]
    if form not in there:
        raise InputMissing(
            f"{artifact.address} has no {form}, it was exported as {', '.join(there)}; name one of these, or export "
            "again under another run's name with export.forms"
        )
    return [name for name in names if name.startswith(f"{form}/") or name in WITH_EACH]


@contextmanager
def lock_folder(folder: Path) -> Iterator[Path]:
    """The folder, made if need be, while no other process is in here with it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        raise StoreError(f"another pull is writing to {folder}; wait for it, or name another folder") from error
    finally:
        os.close(handle)


def _describe_missing(partial: Path, sizes: dict[str, int]) -> str:
    lacks = [
        name for name, size in sizes.items() if not (partial / name).is_file() or (partial / name).stat().st_size < size
    ]
    more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
    return f"{partial} lacks {lacks[0]}{more} of {len(sizes)} files" if lacks else f"{partial} has every file"
