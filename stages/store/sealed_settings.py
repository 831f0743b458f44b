"""The config of a finished run, as far as its records tell it: enough to export its student once more.

A record holds the settings that name a result, but neither addresses of inputs nor what only concerns the execution.
"""

from __future__ import annotations

from collections.abc import Mapping

from dmdr.config.changes import split_key
from dmdr.config.forms import Form
from dmdr.config.load import validate
from dmdr.config.reward_weights import OF_REWARD, VERIFIERS
from dmdr.config.rl import list_idle
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.errors import ConfigError
from dmdr.teacher.load import TeacherSource, is_teacher
from stages.store.address import shorten
from stages.store.records import Record

Sections = dict[str, object]
EXPORT_READS = (
    "seed",
    "teacher",
    "student",
    "fake_score",
    "precision",
    "frozen_base",
    "cold_start",
    "joint",
)  # of cold start and joint
REWARDS = ("cold_start.rl.rewards", "joint.rl.rewards")  # their keys are names of rewards, which may have dots


def rebuild_config(records: Mapping[StageName, Record], run: str, teacher: str, forms: tuple[Form, ...]) -> Config:
    """The config of a run for another export.

    records: by stage; that of joint is needed, and that of the cold start where the run had one. teacher: its address
    on this machine.
    Prompts and evaluation are not those of the run: an export reads neither.

    Raises:
        ConfigError: the student has no such form.
    """
    settings: Sections = {}
    stages: tuple[StageName, ...] = ("cold_start", "joint", "export")
    for stage in stages:
        record = records.get(stage)
        for key, value in record.identity.items() if record is not None else ():
            if key.split(".")[0] in (*EXPORT_READS, "export"):
                _put(settings, key, value)
    started_from = next((records[stage].provenance.start for stage in stages if stage in records), None)
    if isinstance(student := settings.get("student"), dict) and "start" in student:
        student["start"] = {**_section(student, "start"), "path": started_from or f"that of run {run}"}
    for training in ("cold_start", "joint"):
        rl = _section(_section(settings, training), "rl")
        for name in list_idle(rl):  # a record has all settings
            rl.pop(name, None)
    if own := list_own_rewards(settings):  # where their code lies, no record says, and an export runs none
        settings["rewards"] = {name: {"entry_point": f"that of run {run}"} for name in own}
    data: Sections = {
        "cold_start": None,  # unless the run had one
        **settings,
        "run": run,
        "teacher": {**_section(settings, "teacher"), "path": teacher},
        "prompts": {"sources": [f"those of run {run}"]},
        "evaluate": {"metrics": [], "seeds": 2, "models": ["teacher"]},
        "export": {**_section(settings, "export"), "forms": list(forms)},
    }
    return validate(data, Config, f"run {run} as {forms[-1]}")


def list_own_rewards(settings: Sections) -> list[str]:
    """The rewards of the user's own that training named."""
    named = [
        name
        for training in ("cold_start", "joint")
        for name in _section(_section(_section(settings, training), "rl"), "rewards")
    ]
    for training in ("cold_start", "joint"):
        reward = _section(_section(settings, training), "watch").get("reward")
        named += [] if reward is None else [str(reward)]
    return [name for name in named if name not in OF_REWARD and name not in VERIFIERS]


def check_teacher(records: Mapping[StageName, Record], source: TeacherSource, teacher: str) -> None:
    """Raises ConfigError if a teacher is not the one that the run was made with. teacher: its address."""
    joint = records["joint"]
    if not is_teacher(source, joint.teacher_digest):
        name = joint.provenance.teacher or f"sha256 {shorten(joint.teacher_digest)}"
        raise ConfigError(
            f"teacher {teacher} is not the one that the run was made with ({name}); name that one with --teacher"
        )


def _put(settings: Sections, key: str, value: object) -> None:
    """Put a value at its dotted key."""
    above = next((each for each in REWARDS if key.startswith(f"{each}.")), None)
    *parts, last = split_key(key) if above is None else [*above.split("."), key.removeprefix(f"{above}.")]
    section = settings
    for part in parts:
        inner = section.setdefault(part, {})
        assert isinstance(inner, dict), key
        section = inner
    section[last] = value


def _section(settings: Sections, name: str) -> Sections:
    section = settings.get(name)
    assert section is None or isinstance(section, dict), name
    return section or {}
