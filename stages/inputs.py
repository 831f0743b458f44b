"""What a stage's result is made from, each input by its fingerprint. Cheap, and without torch."""

from __future__ import annotations

from dmdr import decoders, teacher
from dmdr.config import Config, ReFL
from dmdr.errors import InputMissing
from stages import sources
from stages.artifacts import Artifact

CHAIN = {"prompts": (), "cold_start": ("prompts",), "joint": ("prompts", "cold_start"), "export": ("joint",)}
SHOWS = {
    "student": "export",
    "cold start": "cold_start",
}  # which stage's result evaluate draws from; the teacher is given


def upstream(config: Config, stage: str) -> tuple[str, ...]:
    """The stages whose results this one reads; what evaluate reads depends on who is compared."""
    if stage != "evaluate":
        return CHAIN[stage]
    return ("prompts", *(needed for model, needed in SHOWS.items() if model in config.evaluate.models))


def inputs(config: Config, stage: str, store: str, run: str) -> dict[str, str]:
    """name -> fingerprint: the teacher, the prompt sources of the stage prompts, the stages before.

    Raises:
        InputMissing: the teacher, a prompt file or a tiny decoder does not exist, or a stage before is not sealed.
    """
    found = {"teacher": teacher.digest(teacher.resolve(config.teacher.path))}
    if stage == "prompts":
        found |= {f"source:{index}": sources.digest(source) for index, source in enumerate(config.prompts.sources)}
        if config.prompts.evaluation is not None:
            found["evaluation"] = sources.digest(config.prompts.evaluation)
    if stage == "joint" and isinstance(config.joint.rl, ReFL) and config.joint.rl.tiny_decoder is not None:
        found["tiny_decoder"] = teacher.digest(decoders.resolve(config.joint.rl.tiny_decoder))
    for before in upstream(config, stage):
        artifact = Artifact(store, run, before)
        record = artifact.record()
        if record is None:
            raise InputMissing(
                f"it needs {before}, which is not sealed at {artifact.address}; run python -m stages {before} "
                "with the same config, run and store first"
            )
        found[before] = record["fingerprint"]
    return found
