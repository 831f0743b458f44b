"""Whether a start fits its teacher and its student: known from headers and configurations, before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.backbones.lora_targets import select_targets
from dmdr.config.few_steps import FewSteps
from dmdr.config.student import Student
from dmdr.errors import ConfigError, DataError
from dmdr.path import FlowPath, VPPath
from dmdr.teacher import digests
from dmdr.teacher.index import NETWORKS, read_index
from dmdr.teacher.load import TeacherSource, is_teacher
from dmdr.teacher.start_files import KEY, StartSource, find_start
from dmdr.teacher.start_headers import StartHeader, read_header
from dmdr.teacher.start_lora import read_lora
from dmdr.teacher.start_network import check_network
from dmdr.teacher.start_sampler import Sampling, compare_sampling, read_sampling

if TYPE_CHECKING:
    from dmdr.backbones.protocol import Backbone

TEACHER = "dmdr.teacher"  # in the metadata of our exports: the digest of the teacher


def check_start(
    student: Student, backbone: Backbone, teacher: TeacherSource | None, *, trains_at_once: bool
) -> list[str]:
    """Check that a student of these settings can begin at its start; returns lines that a user should read.

    Args:
        student: of the config; it has a start.
        backbone: of the teacher, which may lie on meta.
        teacher: where it lies, to compare it with the one that a LoRA of ours was trained on. None: it is not here.
        trains_at_once: whether joint training begins there without a cold start.

    Raises:
        ConfigError: the start's form, rank or modules are not those of the student, or it samples otherwise.
        DataError: the start is of another architecture or another teacher, or is damaged.
        InputMissing: it is not there.
    """
    start = student.start
    assert start is not None
    source = find_start(start, student.form)
    header = read_header(source)
    _check_weights(source, header, student, backbone, teacher)
    theirs = read_sampling(source, header)
    is_unsaid = student.few_steps == FewSteps(student.steps)
    ours = describe_sampling(backbone, student.few_steps)
    lines = compare_sampling(start.path, ours, theirs, refuses=trains_at_once and is_unsaid)
    if trains_at_once and isinstance(teacher, Path) and _is_teacher_itself(source, teacher / _name_network(teacher)):
        lines.append(
            f"{KEY} {start.path} is the teacher itself, which draws nothing good in {student.steps} steps: give a "
            "few-step model, or a cold_start"
        )
    return lines


def _name_network(teacher: Path) -> str:
    """The folder of a teacher's network."""
    return NETWORKS[read_index(teacher).family][0]


def _is_teacher_itself(source: StartSource, network: Path) -> bool:
    """Whether the start's files are those of the teacher's network. Their digests name the result, and are known."""
    own = {digests.digest(file) for file in network.glob("*.safetensors")}
    return own.issuperset(digests.digest(file) for file in source.files)


def describe_sampling(backbone: Backbone, few: FewSteps) -> Sampling:
    """How the student of a config samples."""
    timesteps = tuple(backbone.student_timesteps(few).tolist())
    path, shift = backbone.path, None
    if isinstance(path, FlowPath) and len(timesteps) > 1:  # of the second time: t = shift u / (1 + (shift - 1) u)
        t, u = timesteps[1] / timesteps[0], 1 - 1 / len(timesteps)
        shift = t * (1 - u) / (u * (1 - t))
    predicts = path.predicts if isinstance(path, VPPath) else None
    return Sampling(few.steps, timesteps, renoises=few.is_stochastic, shift=shift, predicts=predicts)


def _check_weights(
    source: StartSource, header: StartHeader, student: Student, backbone: Backbone, teacher: TeacherSource | None
) -> None:
    start = student.start
    assert start is not None
    if header.is_lora:
        _check_lora(source, header, student, backbone, teacher)
        return
    if student.form == "lora":
        raise ConfigError(
            f"{KEY} {start.path} holds full weights and student.form is lora, which only adds to the teacher's; set "
            "form: full, or give a LoRA"
        )
    if start.scale != 1.0:
        raise ConfigError(f"student.start.scale is {start.scale:g} but {KEY} {start.path} holds no LoRA; drop it")
    check_network(source, header, backbone.network)


def _check_lora(
    source: StartSource, header: StartHeader, student: Student, backbone: Backbone, teacher: TeacherSource | None
) -> None:
    assert student.start is not None
    of = header.metadata.get(TEACHER)
    if of is not None and teacher is not None and not is_teacher(teacher, of):
        raise DataError(
            f"{KEY} {source.address} is a LoRA of another teacher (sha256 {of[:12]}…); give the teacher that it was "
            "trained from, or a start of this one"
        )
    modules = read_lora(source, backbone.network, type(backbone.pipe), scale=student.start.scale)
    if student.form == "full":
        return
    ranks = sorted({module.rank for module in modules.values()})
    if ranks != [student.lora_rank]:
        found = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks from {ranks[0]} to {ranks[-1]}"
        change = f"set student.lora_rank: {ranks[0]}" if len(ranks) == 1 else "set student.form: full, which fuses it"
        raise ConfigError(
            f"{KEY} {source.address} is a LoRA of {found} and student.lora_rank is {student.lora_rank}; {change}"
        )
    targets = select_targets(
        backbone.network,
        student.lora_targets,
        attention=backbone.lora_targets,
        wide=backbone.wide_targets,
        key="student.lora_targets",
    )
    ends = tuple(f".{target}" for target in targets)
    if others := [name for name in modules if not f".{name}".endswith(ends)]:
        raise ConfigError(
            f"{KEY} {source.address} adapts {others[0]}, which the student's LoRA does not; add it to "
            "student.lora_targets, or set student.form: full, which fuses it"
        )
