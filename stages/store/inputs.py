"""Fingerprint the inputs from which a stage makes its result. Fast, because it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from dmdr.config.rl import ReFL
from dmdr.config.run import Config
from dmdr.config.stages import STAGES, StageName, list_reads
from dmdr.errors import ConfigError, InputMissing, RewardUnavailable
from dmdr.rewards import weights
from dmdr.rewards.identity import digest_rewards
from dmdr.rewards.sources import RewardSources, list_sources
from dmdr.rl.tiny_decoder import find_tiny_decoder
from dmdr.teacher import digests
from dmdr.teacher.load import (
    ONE_FILE,
    TeacherSource,
    digest_pipeline,
    digest_teacher,
    family_of,
    find_diffusers_folder,
    find_teacher_of,
    is_teacher,
)
from dmdr.teacher.start_files import digest_start, find_start
from stages.prompt_sources import sources
from stages.store.address import shorten
from stages.store.artifacts import Artifact
from stages.store.records import Record


def fingerprint_inputs(
    config: Config, stage: StageName, store: str, run: str, *, rewards: RewardSources | None = None
) -> dict[str, str]:
    """Name of each input -> its fingerprint.

    Inputs are the teacher, what the student starts from, the prompt sources of the stage prompts, the weights of
    rewards, the user's own rewards, the tiny decoder, other pipelines on the scorecard, and the stages before. A run
    that DMDR 0.1 began keeps the digests from then.

    rewards: where they lie; then the service of one is waited for. None: the config's, and one that is away has the
    digest that the stage recorded when it began.

    Raises:
        ConfigError: the teacher's family does not have a form of export.forms, or a stage before was made from another
            teacher, or from another result than this run's.
        InputMissing: the teacher, a prompt file, a tiny decoder or a reward does not exist, or a stage before is not
            sealed.
        RewardUnavailable: the service of a reward does not answer.
    """
    teacher = find_teacher_of(config.teacher)
    check_forms(config, teacher)
    inputs = {"teacher": _digest_for_run(teacher, store, run)}
    claim, metrics = Artifact(store, run, stage).read_claim(), config.metrics_with_weights(stage)
    recorded = None if claim is None else claim.inputs
    if stage == "prompts":
        sets = sources.select_public_sets(config.prompts)
        for name, source in sources.list_inputs(config.prompts).items():
            inputs[name] = sources.digest_source(source, sets)
    if stage == "evaluate":  # a scorecard is made even if some weights are missing, and says so
        inputs |= weights.digest_weights_or_missing(metrics, config.weights, recorded)
        for name, pipeline in config.evaluate.pipelines.items():
            folder = find_diffusers_folder(f"evaluate.pipelines.{name}.path", pipeline.path)
            inputs[f"pipeline:{name}"] = digest_pipeline(folder)
    else:
        inputs |= weights.digest_weights(metrics, config.weights, recorded)
    inputs |= _digest_rewards(config, stage, rewards, recorded or {})
    rl = config.list_rl().get(stage)
    if isinstance(rl, ReFL) and rl.tiny_decoder is not None:
        inputs["tiny_decoder"] = digests.digest(find_tiny_decoder(rl.tiny_decoder))
    if config.student.start is not None and needs_start(config, stage):
        inputs["start"] = digest_start(find_start(config.student.start, config.student.form))
    for before in list_reads(stage, config.evaluate.models, config.stages):
        artifact = Artifact(store, run, before)
        record = artifact.record()
        if record is None:
            raise InputMissing(
                f"it needs {before}, which is not sealed at {artifact.address}; run python -m stages {before} "
                "with the same config, run and store first"
            )
        _check_teacher(artifact, record, inputs["teacher"], config.teacher.path)
        _check_stages_before(artifact, record)
        inputs[before] = record.fingerprint
    return inputs


def _digest_rewards(
    config: Config, stage: StageName, rewards: RewardSources | None, recorded: Mapping[str, str]
) -> dict[str, str]:
    """The digests of the rewards of a stage that no weights of the config identify. Arguments as above."""
    names = config.list_rewards(stage) | (
        {"ocr"}.intersection(config.evaluate.metrics) if stage == "evaluate" else set()
    )
    digests: dict[str, str] = {}
    for name in sorted(names):
        key = f"reward:{name}"
        try:
            digests |= digest_rewards([name], rewards or list_sources(config), waits=rewards is not None)
        except RewardUnavailable:
            if key not in recorded or rewards is not None:
                raise
            digests[key] = recorded[key]
        except InputMissing:
            if stage != "evaluate" or name in config.rewards:
                raise
            digests[key] = weights.MISSING  # a scorecard is made without it, and says so
    return digests


def needs_start(config: Config, stage: StageName) -> bool:
    """Whether a stage reads the student's start: the first training stage, and an evaluation that compares it."""
    if config.student.start is None:
        return False
    return stage == config.training_stages[0] or (stage == "evaluate" and "start" in config.evaluate.models)


def _digest_for_run(teacher: TeacherSource, store: str, run: str) -> str:
    """The digest of the teacher, in the form in which this run began to record it."""
    for stage in STAGES:
        if (claim := Artifact(store, run, stage).read_claim()) is not None:
            recorded = claim.teacher_digest
            return recorded if is_teacher(teacher, recorded) else digest_teacher(teacher)
    return digest_teacher(teacher)


def check_forms(config: Config, teacher: TeacherSource) -> None:
    """Raises ConfigError if the teacher's family does not have a form of export.forms."""
    if "single-file" in config.forms and (family := family_of(teacher)) not in ONE_FILE:
        raise ConfigError(
            f"export.forms has single-file, but the teacher is of the family {family}; only "
            f"{' and '.join(ONE_FILE)} have that form: take it out"
        )


def _check_teacher(artifact: Artifact, record: Record, teacher: str, path: str) -> None:
    """Raises ConfigError if a stage was made with another teacher. teacher, path: digest and path of the config's."""
    recorded = record.teacher_digest
    if recorded != teacher:
        raise ConfigError(
            f"{artifact.stage} of run {artifact.run} was made with another teacher (sha256 {shorten(recorded)}) than "
            f"teacher.path {path} ({shorten(teacher)}), and a student fits only its own teacher; give the teacher it "
            "was made with, or begin another run with --run"
        )


def _check_stages_before(artifact: Artifact, record: Record) -> None:
    """Raises ConfigError if a stage was made from other results than those that are sealed in its run now."""
    for earlier in set(STAGES) & record.inputs.keys():
        present = Artifact(artifact.store, artifact.run, earlier).record()
        if present is not None and present.fingerprint != record.inputs[earlier]:
            raise ConfigError(
                f"{artifact.address} was made from another {earlier} than this run's: it was copied there, or "
                f"{earlier} was made anew; delete it and run {artifact.stage} again"
            )
