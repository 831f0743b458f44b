"""`dmdr run --dry-run`: what would run, be skipped or be refused, stage by stage. It writes nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import PurePosixPath

from dmdr.config.identity import identity
from dmdr.config.plain_text import to_line
from dmdr.config.run import Config
from dmdr.config.stages import StageName, list_reads, list_until
from dmdr.errors import SEALED, USER_ERRORS, ConfigError, exit_code_of
from dmdr.teacher import hub
from dmdr.teacher.load import find_teacher_of
from stages.reports.scorecard_text import format_table
from stages.store.address import list_differences, normalise_json
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.layout import CHECKPOINTS
from stages.store.records import Claim, Record
from stages.store.teacher_folder import resolve_teacher

COPIED: tuple[StageName, ...] = ("prompts", "cold_start")  # what --from-cold-start copies


@dataclass(frozen=True)
class Step:
    """What would become of a stage. code: the exit code with which it would be refused, or SEALED."""

    does: str
    why: str
    code: int = SEALED


def print_steps(config: Config, run: str, store: str, until: StageName | None, cold_start_of: str | None) -> int:
    """Print what would happen to each stage; returns the exit code of the first refusal, or 0."""
    on_cluster = config.execution.cluster is not None  # then this machine may have no teacher and no prompts
    try:
        checked = config if on_cluster else check_inputs(config)
    except USER_ERRORS as error:
        print(f"refused: {to_line(error)}", file=sys.stderr)
        return exit_code_of(error)
    steps: dict[StageName, Step] = {}
    for stage in list_until(until, config.stages):
        of = cold_start_of if stage in COPIED else None
        try:
            steps[stage] = foresee(checked, Artifact(store, run, stage), of, on_cluster=on_cluster)
        except USER_ERRORS as error:
            steps[stage] = Step("refused", str(error), exit_code_of(error))
    rows = [["stage", "would", "because"], *([stage, step.does, step.why] for stage, step in steps.items())]
    print(format_table(rows))
    return next((step.code for step in steps.values() if step.code), SEALED)


def check_inputs(config: Config) -> Config:
    """The config with its teacher found, after the checks that the stage prompts begins with.

    Raises:
        any of USER_ERRORS: the run would be refused.
    """
    from stages.prompt_sources.sources import select_public_sets
    from stages.prompts import check_run  # brings torch
    from stages.runtime.prerequisites import check_worlds

    if hub.is_hub(config.teacher.path):
        hub.require("teacher.path", config.teacher.path)
    else:
        config = resolve_teacher(config, None, lambda size: None)
        find_teacher_of(config.teacher)
        check_worlds(config)
    if config.student.start is not None and hub.is_hub(config.student.start.path):
        hub.require("student.start.path", config.student.start.path)
    check_run(config, select_public_sets(config.prompts), print, fetches=False)
    return config


def foresee(config: Config, artifact: Artifact, adopt: str | None, *, on_cluster: bool) -> Step:
    """What would become of a stage. adopt: the run whose result would be copied.

    Raises:
        any of USER_ERRORS: the store does not answer, or an input is not there.
    """
    stage: StageName = artifact.stage  # type: ignore[assignment]  # an Artifact also takes other addresses' names
    record = artifact.record()
    before = [
        Artifact(artifact.store, artifact.run, each)
        for each in list_reads(stage, config.evaluate.models, config.stages)
    ]
    is_ready = all(each.record() is not None for each in before) and not on_cluster
    owner = record or artifact.read_claim()
    inputs = None
    if is_ready and (owner is not None or adopt is not None):  # else nothing is compared, and nothing fetched for it
        inputs = fingerprint_inputs(config, stage, artifact.store, artifact.run)
    if record is None and adopt is not None:
        return _foresee_copy(config, Artifact(artifact.store, adopt, stage), inputs)
    differences = [] if owner is None else compare(config, owner, inputs)
    if record is not None and not differences:
        return Step("be skipped", f"it is sealed at {artifact.address}")
    if differences and (record is not None or not artifact.is_bare()):
        message = artifact.describe_conflict(differences, is_sealed=record is not None)
        return Step("be refused", message, ConfigError.exit_code)
    if newest := find_checkpoint(artifact):
        return Step("go on", f"it has the checkpoint {newest}")
    return Step("run", "nothing of it is there" if owner is None else "nothing came of it yet")


def compare(config: Config, owner: Claim, inputs: dict[str, str] | None) -> list[str]:
    """In what a claim differs from this config. inputs: None where they are not known yet, and are not compared."""
    stage: StageName = owner.stage  # type: ignore[assignment]  # written by a stage
    wanted = owner.model_copy(
        update={
            "identity": normalise_json(identity(config, stage)),
            "inputs": owner.inputs if inputs is None else inputs,
        }
    )
    return list_differences(owner, wanted)


def find_checkpoint(artifact: Artifact) -> str | None:
    """The name of the newest checkpoint of an open stage."""
    names = [PurePosixPath(name) for name in artifact.place.names()]
    steps = [name.parent.name for name in names if name.match(f"{CHECKPOINTS}/*/manifest.json")]
    return max(steps, default=None)


def _foresee_copy(config: Config, other: Artifact, inputs: dict[str, str] | None) -> Step:
    record: Record = other.sealed()
    if differences := compare(config, record, inputs):
        return Step("be refused", f"that of {other.run} is another: {'; '.join(differences)}", ConfigError.exit_code)
    return Step("be copied", f"from {other.address}")
