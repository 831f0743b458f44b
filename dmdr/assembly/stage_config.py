"""The settings of one training stage, and the files that it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.config.rl import AnyRL
from dmdr.config.run import Config
from dmdr.config.stages import StageName
from dmdr.config.training import Joint, Training
from dmdr.config.watch import Watch

STUDENT_FILE, EMA_FILE, FAKE_FILE = "student.safetensors", "student_ema.safetensors", "fake_score.safetensors"
KEPT = "kept"  # the folder of the students of the best looks


def name_kept(update: int) -> str:
    """The file of the student that the watch kept before an update."""
    return f"{KEPT}/update-{update:08d}.safetensors"


@dataclass(frozen=True)
class StageConfig:
    """The settings of one training stage. A cold start always matches distributions."""

    name: StageName
    training: Training
    rl: AnyRL | None = None
    distribution_matching: bool = True
    watch: Watch | None = None
    fake_warmup: int = 0


def select_stage(config: Config, stage: StageName) -> StageConfig:
    """The settings of `cold_start` or `joint`."""
    training: Training | None = config.joint if stage == "joint" else config.cold_start
    assert training is not None, "a run without a cold start has no such stage"
    if isinstance(training, Joint):
        return StageConfig(
            stage, training, training.rl, training.distribution_matching, training.watch, training.fake_warmup
        )
    return StageConfig(stage, training, training.rl, watch=training.watch)
