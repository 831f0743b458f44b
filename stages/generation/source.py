"""Where a run's student lies: in its export, or in the newest result or checkpoint of its training."""

from __future__ import annotations

import difflib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from dmdr.config.few_steps import FewSteps
from dmdr.config.inputs import Teacher
from dmdr.config.run import Config
from dmdr.config.stages import TRAINING_STAGES
from dmdr.config.student import Student
from dmdr.errors import DataError, InputMissing
from dmdr.export.write import WEIGHTS
from dmdr.shared_base import scale_lora
from dmdr.teacher.hub import is_hub
from dmdr.teacher.key_map import Weights
from dmdr.teacher.load import TeacherSource, digest_teacher, find_teacher, is_teacher
from stages.reports.export_facts import ExportFacts
from stages.store.address import shorten
from stages.store.artifacts import Artifact
from stages.store.records import Claim, Json
from stages.store.runs import is_run, list_runs
from stages.store.teacher_folder import resolve_teacher

PIPELINE = "pipeline/"
KEEP = 2  # of checkpoints; nothing is saved here, so that it does not matter


@dataclass(frozen=True)
class StudentSource:
    """A student that can draw.

    stage: whose result it is. update: of an open stage, the update of its newest checkpoint; None: the stage is sealed.
    settings: that name the result. teacher: its name and digest; the name is None in early records.
    """

    artifact: Artifact
    stage: str
    update: int | None
    settings: Json
    teacher: str | None
    teacher_digest: str

    @property
    def is_lora(self) -> bool:
        return self.settings["student.form"] == "lora"

    @property
    def few_steps(self) -> FewSteps:
        """How it samples. A setting that early results do not have is at its default."""
        named = {name.removeprefix("student."): value for name, value in self.settings.items()}
        return Student.model_validate({name: named[name] for name in Student.model_fields if name in named}).few_steps

    @property
    def lora_scale(self) -> float:
        """How often the product of a checkpoint's LoRA counts: alpha / rank. A sealed LoRA has it in its B."""
        rank, alpha = (self.settings.get(f"student.lora_{name}") for name in ("rank", "alpha"))
        return 1.0 if alpha is None else float(str(alpha)) / int(str(rank))

    def describe(self) -> str:
        """Which student it is."""
        if self.update is not None:
            return f"{self.stage}, the EMA after update {self.update}"
        return "exported" if self.stage == "export" else f"{self.stage}, sealed"


def find_student(store: str, run: str) -> StudentSource:
    """The latest student of a run: exported as a pipeline, trained jointly, in joint training, after its cold start...

    Raises:
        ConfigError: no run can have that name.
        InputMissing: there is no such run, or it has no student yet.
    """
    artifacts = [Artifact(store, run, stage) for stage in ("export", "joint", "cold_start")]
    if not is_run(store, run):
        near = difflib.get_close_matches(run, list_runs(store), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"dmdr runs --store {store} lists those that are"
        raise InputMissing(f"there is no run {run} at {store}; {hint}")
    for artifact in artifacts:
        is_export, record = artifact.stage == "export", artifact.record()
        if record is not None and (not is_export or any(name.startswith(PIPELINE) for name in record.files)):
            return _build_source(artifact, record, None)
        claim = artifact.read_claim()
        if is_export or claim is None:
            continue
        newest = artifact.checkpoints(KEEP).newest()
        if newest is not None:
            return _build_source(artifact, claim, int(str(newest.info["update"])))
    raise InputMissing(
        f"run {run} at {store} has no student to draw with yet: no training stage has a result or a checkpoint; "
        "dmdr run goes on with it"
    )


def _build_source(artifact: Artifact, claim: Claim, update: int | None) -> StudentSource:
    prompts = Artifact(artifact.store, artifact.run, "prompts").record()
    teacher = None if prompts is None else prompts.provenance.teacher
    claims = [Artifact(artifact.store, artifact.run, stage).read_claim() for stage in TRAINING_STAGES]
    trained = next((each for each in claims if each is not None), claim)  # a run may have no cold start
    settings = {**trained.identity, **claim.identity}
    return StudentSource(artifact, artifact.stage, update, settings, teacher, claim.teacher_digest)


def find_teacher_of_run(source: StudentSource, config: Config | None) -> TeacherSource:
    """The teacher of a run, verified. config: the run's, which knows where a folder, a file or a published one lies.

    Raises:
        InputMissing: the teacher is a folder or a file, and no config says where.
        DataError: the config's teacher is another one.
    """
    if config is not None:
        section = resolve_teacher(config, None, lambda size: None).teacher
    elif source.teacher is not None and source.teacher.startswith(("lab:", "hub:")):
        section = Teacher(path=source.teacher, guidance_scale=1.0)
    else:
        named = f"teacher {source.teacher}" if source.teacher else "the teacher"
        raise InputMissing(
            f"the store does not know where {named} of run {source.artifact.run} lies; give the run's config, a .yaml "
            "file, in place of its name"
        )
    teacher = find_teacher(section.path, section.parts)
    if not is_hub(section.path) and not is_teacher(teacher, source.teacher_digest):
        raise DataError(
            f"teacher {section.path} (sha256 {shorten(digest_teacher(teacher))}) is not the one that run "
            f"{source.artifact.run} was made from ({shorten(source.teacher_digest)}); give the config of this run"
        )
    return teacher


def read_weights(source: StudentSource) -> Weights:
    """The averaged weights of a student that is not exported, under diffusers' names.

    Raises:
        InputMissing: the checkpoint was deleted in the meantime.
        DataError: a file is damaged.
    """
    if source.update is None:
        with tempfile.TemporaryDirectory() as cache:
            return load_file(source.artifact.fetch(Path(cache), lambda name: name == WEIGHTS) / WEIGHTS)
    newest = source.artifact.checkpoints(KEEP).newest()
    if newest is None:
        raise InputMissing(
            f"{source.stage} of run {source.artifact.run} has no checkpoint any more; repeat the command"
        )
    ema = {name.removeprefix("ema/"): newest.tensors[name] for name in newest.tensors if name.startswith("ema/")}
    if not source.is_lora:
        return ema
    return scale_lora({name.replace(".student.", "."): value for name, value in ema.items()}, source.lora_scale)


def read_export(source: StudentSource, cache: Path) -> tuple[Path, ExportFacts]:
    """The folder of an exported pipeline, verified, and the facts beside it. cache: a remote store is copied there.

    Raises:
        DataError: a file is damaged, or provenance.json is not DMDR's.
    """
    folder = source.artifact.fetch(cache, lambda name: name.startswith(PIPELINE) or name == "provenance.json")
    try:
        facts = ExportFacts.model_validate_json((folder / "provenance.json").read_bytes())
    except ValueError as error:
        raise DataError(
            f"{source.artifact.address}/provenance.json was not written by this DMDR; export again"
        ) from error
    return folder / PIPELINE, facts
