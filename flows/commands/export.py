"""`dmdr export`: the student of a finished run in another form, on this machine. The store stays as it is."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from dmdr.config.forms import Form
from dmdr.config.stages import STAGES
from dmdr.errors import InputMissing
from dmdr.teacher.load import find_teacher_of
from flows.commands.pull import pull_stage, require_new_folder
from stages.runtime.context import Context
from stages.runtime.progress import Progress
from stages.store.artifacts import Artifact
from stages.store.inputs import check_forms
from stages.store.records import Record
from stages.store.runs import find_run
from stages.store.sealed_settings import check_teacher, rebuild_config
from stages.store.teacher_folder import resolve_teacher

OF_KEPT = re.compile(r"kept/update-(\d+)\.safetensors")  # as the stage names them


def export_form(
    run: str, form: Form, folder: str, *, teacher: str | None, store: str, update: int | None = None
) -> int:
    """Write the student in one form to a new folder, checked as the stage export does; returns 0.

    A form that the run has sealed is copied. teacher: where the run's teacher lies; needed if it was a folder. update:
    of a student that the watch kept; None: the run's.

    Raises:
        InputMissing: there is no such run, its joint training is not sealed or kept no such student, or the teacher is
            not there.
        ConfigError: the student has no such form, or the teacher is another one.
        DataError: a file is damaged, or the form does not draw the student's images.
    """
    run = find_run(store, run)
    target = require_new_folder(folder)
    artifact = Artifact(store, run, "export")
    sealed = artifact.record()
    if update is None and sealed is not None and any(name.startswith(f"{form}/") for name in sealed.files):
        return pull_stage(run, "export", folder, store, form)
    joint = Artifact(store, run, "joint").sealed()
    if update is not None:
        check_kept(joint, update)
    records = {stage: record for stage in STAGES if (record := Artifact(store, run, stage).record()) is not None}
    address = teacher or find_recorded_teacher(records["joint"].provenance.teacher, run)
    forms: tuple[Form, ...] = ("pipeline", form) if form == "single-file" else (form,)
    config = resolve_teacher(rebuild_config(records, run, address, forms), None, lambda size: None)
    source = find_teacher_of(config.teacher)
    check_teacher(records, source, address)
    check_forms(config, source)
    from stages.export import run as write_forms  # brings torch

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        out = Path(place) / "out"
        out.mkdir()
        context = Context(config, artifact, out, Path(place) / "inputs", Progress("export"), lambda: False)
        write_forms(context, update=update)
        if target.is_dir():
            target.rmdir()
        shutil.move(out, target)
    which = "" if update is None else f", the student of update {update},"
    print(f"{form} of {run}{which} is in {target}")
    return 0


def check_kept(joint: Record, update: int) -> None:
    """
    Raises:
        InputMissing: joint training did not keep the student of this update.
    """
    kept = sorted(int(found[1]) for name in joint.files if (found := OF_KEPT.fullmatch(name)) is not None)
    if update not in kept:
        has = f"it kept those of {', '.join(map(str, kept))}" if kept else "it kept none"
        raise InputMissing(
            f"--update {update}: joint training of run {joint.run} did not keep its student; {has}. "
            "joint.watch.keep_best says how many of the best looks a run keeps"
        )


def find_recorded_teacher(name: str | None, run: str) -> str:
    """The address of a teacher that its name tells.

    Raises:
        InputMissing: it was a folder of some machine.
    """
    if name is not None and name.startswith(("lab:", "hub:")):
        return name
    raise InputMissing(
        f"the teacher {name or '(without a name)'} of run {run} is a folder that only you know; name it with "
        "--teacher PATH"
    )
