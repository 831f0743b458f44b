"""`dmdr pull`: copies a sealed stage, or one form of an export, to a folder that appears only when it is whole."""

from __future__ import annotations

import fcntl
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dmdr.config.forms import FORMS, Form
from dmdr.config.stages import StageName
from dmdr.errors import ConfigError, DataError, InputMissing, Stopped, StoreError
from flows.commands.to_hub import check_upload, upload_export
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.download import download
from stages.store.layout import is_intact
from stages.store.runs import follow_name
from stages.store.signature import verify_folder

WITH_EACH = ("provenance.json", "SHA256SUMS")  # files that come with each form
MEGABYTE = 10**6


def pull_stage(
    run: str,
    stage: StageName,
    folder: str,
    store: str,
    form: Form | None,
    *,
    hub: str | None = None,
    key: str | None = None,
) -> int:
    """Copy the files of a sealed stage to `folder` and verify each; returns the exit code.

    A pull that was cut off continues with the files that it has. Until the copy is whole, its files lie in
    .FOLDER.partial beside it. run: its name, or a name that it was promoted to. form: copy only this form of an export.
    hub: a repository of the model hub to upload the export to. Then `folder` may hold a whole copy of it already.
    key: a public key; the copy appears only if its owner has signed it.

    Raises:
        ConfigError: the folder is not empty, `form`, `hub` or `key` is set and the stage is not the export, or the hub
            refuses.
        InputMissing: the stage is not sealed, or was not exported in this form, or there is no such key.
        DataError: a file is missing or damaged, the record is of another run or stage, or the signature is not right.
        StoreError: the store, the disk or the hub fails, or another pull is writing to this folder.
    """
    target = Path(folder).absolute() if hub is not None else require_new_folder(folder)
    for option, value in (("--form", form), ("--to-hub", hub), ("--verify", key)):
        if value is not None and stage != "export":
            raise ConfigError(f"{option} is for the stage export, and the stage is {stage}; leave it out")
    if hub is not None:
        check_upload(hub, form)
    artifact = Artifact(store, follow_name(store, run), stage)
    if artifact.run != run:
        print(f"{run} is run {artifact.run}")
    if is_new_folder(target):
        exit_code = copy_files(artifact, select_files(artifact, form), target, partial(check_signature, form, key))
        if exit_code:
            return exit_code
        print(f"{form or stage} of {artifact.run} is in {target}")
    elif not is_copy(artifact, select_files(artifact, form), target):
        raise ConfigError(f"{target} exists and holds something else than this export; name a new one")
    else:
        check_signature(form, key, target)
    if hub is not None:
        print(f"{form or stage} of {artifact.run} is at {upload_export(target, artifact, hub)}")
        print("a new repository is private until you change that there")
    return 0


def check_signature(form: Form | None, key: str | None, folder: Path) -> None:
    """Check that the owner of a public key signed a copy of an export, or of one form; nothing without a key.

    Raises:
        InputMissing, ConfigError: there is no such key.
        DataError: he did not.
    """
    if key is not None:
        what = form or "the export"
        verify_folder(folder if form is None else folder / form, key, what)
        print(f"{what} is signed by the owner of {key}")


def is_copy(artifact: Artifact, names: list[str], target: Path) -> bool:
    """Whether a folder holds these files of an artifact, whole, and nothing else."""
    files = artifact.sealed().files
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    return present == set(names) and all(is_intact(target / name, files[name]) for name in names)


def copy_files(artifact: Artifact, names: list[str], target: Path, check: Callable[[Path], None]) -> int:
    """Copy files of an artifact to a folder that appears when it is whole; returns the exit code.

    check: called with the whole copy before it appears; it may raise.

    Raises:
        ConfigError, DataError, InputMissing, StoreError: as `pull_stage`.
    """
    sizes = {name: artifact.sealed().files[name].size for name in names}
    total, progress = sum(sizes.values()), Progress("pulled megabytes")

    def show_progress(copied: int) -> None:
        megabytes = math.ceil(total / MEGABYTE)
        progress.update(megabytes if copied == total else copied // MEGABYTE, megabytes)

    with lock_folder(target.parent / f".{target.name}.partial") as begun:
        try:
            download(artifact, sizes, begun, show_progress)
        except (ConfigError, DataError, OSError) as error:
            kinds = (ConfigError, DataError, InputMissing)
            kind = next((each for each in kinds if isinstance(error, each)), StoreError)
            raise kind(f"{error}; {_describe_missing(begun, sizes)}") from error
        except KeyboardInterrupt:
            print(f"dmdr: stopped; {_describe_missing(begun, sizes)}; repeat the command to go on", file=sys.stderr)
            return Stopped.exit_code
        _delete_others(begun, sizes)
        check(begun)
        begun.rename(target)
    return 0


def is_new_folder(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def require_new_folder(folder: str) -> Path:
    """The absolute path of a folder that is new or empty. Raises ConfigError if it is not."""
    target = Path(folder).absolute()
    if not is_new_folder(target):
        raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
    return target


def select_files(artifact: Artifact, form: str | None) -> list[str]:
    """The names of the files to copy. Raises what `pull_stage` raises."""
    record = artifact.sealed()
    if (record.run, record.stage) != (artifact.run, artifact.stage):
        raise DataError(
            f"{artifact.address} has the record of {record.stage} of run {record.run}: it was copied there; pull "
            "it under its own name"
        )
    names = list(record.files)
    if form is None:
        return names
    exported = [each for each in FORMS if any(name.startswith(f"{each}/") for name in names)]
    if form not in exported:
        raise InputMissing(
            f"{artifact.address} has no {form}, it was exported as {', '.join(exported)}; name one of these, or make "
            f"it: dmdr export {artifact.run} --form {form} --out DIR"
        )
    return [name for name in names if name.startswith(f"{form}/") or name in WITH_EACH]


@contextmanager
def lock_folder(folder: Path) -> Iterator[Path]:
    """Create a folder, unless it is there, and keep other pulls out of it."""
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
    missing = [
        name for name, size in sizes.items() if not (partial / name).is_file() or (partial / name).stat().st_size < size
    ]
    if not missing:
        return f"{partial} has every file"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{partial} lacks {missing[0]}{more} of {len(sizes)} files"


def _delete_others(partial: Path, sizes: dict[str, int]) -> None:
    """Delete files that an earlier pull of other files has left here, and folders that are empty then."""
    for path in sorted(partial.rglob("*"), reverse=True):  # the content of a folder before the folder
        if path.is_file() and path.relative_to(partial).as_posix() not in sizes:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
