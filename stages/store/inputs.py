"""The fingerprints of a stage's inputs: what its result is made from. Cheap, and without torch."""

from __future__ import annotations

from dmdr.config.run import Config, ReFL
from dmdr.config.stages import STAGES, StageName, list_reads
from dmdr.errors import ConfigError, InputMissing
from dmdr.rewards import weights
from dmdr.rl.tiny_decoder import find_tiny_decoder
from dmdr.teacher import digests
from dmdr.teacher.load import ONE_FILE, digest_teacher, family_of, find_diffusers_folder, find_teacher_of
from stages.prompt_sources import sources
from stages.store.address import shorten
from stages.store.artifacts import Artifact


def fingerprint_inputs(config: Config, stage: StageName, store: str, run: str) -> dict[str, str]:
    """name -> fingerprint: the teacher, the prompt sources of the stage prompts, weights of rewards, other pipelines on
    the scorecard, the stages before.

    Raises:
        ConfigError: the teacher's family does not have a form of export.forms, or a stage before was made from another
            teacher, or from another result than this run's.
        InputMissing: the teacher, a prompt file or a tiny decoder does not exist, or a stage before is not sealed.
    """
    source = find_teacher_of(config.teacher)
    if "single-file" in config.forms and (family := family_of(source)) not in ONE_FILE:
        raise ConfigError(
            f"export.forms has single-file, but the teacher is of the family {family}; only "
            f"{' and '.join(ONE_FILE)} have that form: take it out"
        )
    found = {"teacher": digest_teacher(source)}
    if stage == "prompts":
        sets = sources.select_public_sets(config.prompts)
        found |= {
            name: sources.digest_source(source, sets) for name, source in sources.list_inputs(config.prompts).items()
        }
    read = (
        weights.digest_weights_or_missing if stage == "evaluate" else weights.digest_weights
    )  # a card says what it lacks
    found |= read(config.metrics_with_weights(stage), config.weights)
    if stage == "evaluate":
        for name, pipeline in config.evaluate.pipelines.items():
            folder = find_diffusers_folder(f"evaluate.pipelines.{name}.path", pipeline.path)
            found[f"pipeline:{name}"] = digests.digest(folder)
    if stage == "joint" and isinstance(config.joint.rl, ReFL) and config.joint.rl.tiny_decoder is not None:
        found["tiny_decoder"] = digests.digest(find_tiny_decoder(config.joint.rl.tiny_decoder))
    for before in list_reads(stage, config.evaluate.models):
        artifact = Artifact(store, run, before)
        record = artifact.record()
        if record is None:
            raise InputMissing(
                f"it needs {before}, which is not sealed at {artifact.address}; run python -m stages {before} "
                "with the same config, run and store first"
            )
        theirs = record.inputs["teacher"]
        if theirs != found["teacher"]:
            raise ConfigError(
                f"{before} of run {run} was made with another teacher (sha256 {shorten(theirs)}) than teacher.path "
                f"{config.teacher.path} ({shorten(found['teacher'])}), and a student fits no other; give the teacher "
                "it was made with, or begin another run with --run"
            )
        for earlier in set(STAGES) & record.inputs.keys():
            made = Artifact(store, run, earlier).record()
            if made is not None and made.fingerprint != record.inputs[earlier]:
                raise ConfigError(
                    f"{artifact.address} was made from another {earlier} than this run's: it was copied there, or "
                    f"{earlier} was made anew; delete it and run {before} again"
                )
        found[before] = record.fingerprint
    return found
