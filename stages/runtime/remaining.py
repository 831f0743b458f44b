"""How much work the later stages of a run have, measured in steps of the stage that runs now. No torch.

Work is counted in forwards of the teacher's network on one sample (`dmdr/update.py` gives the count of an update); a
backward pass through frozen weights counts as one forward, through trained weights as two. Encoding, export and judging
are not counted: next to these they take seconds.
"""

from __future__ import annotations

from dmdr.config.run import Config
from dmdr.config.stages import STAGES, StageName
from dmdr.config.training import Training


def count_later_steps(config: Config, stage: StageName, *, step: float, prompts: int) -> float:
    """The work of all stages after `stage`, in steps of `stage`.

    step: the work of one of its steps, in forwards. prompts: number of evaluation prompts in the prompt set.
    """
    later = STAGES[STAGES.index(stage) + 1 :]
    return sum(count_forwards(config, each, prompts) for each in later) / step


def count_forwards(config: Config, stage: StageName, prompts: int) -> float:
    """The work of a stage in forwards; 0 where it is not counted."""
    if stage in config.training_stages:
        training = config.training_of(stage)
        warmup = config.joint.fake_warmup if stage == "joint" else 0
        return training.updates * count_update(config, training) + warmup * count_warmup(training)
    if stage == "evaluate":
        images = min(prompts, config.evaluate.limit or prompts) * config.evaluate.seeds
        return images * sum(count_evaluations(config).values())
    return 0.0


def count_update(config: Config, training: Training) -> float:
    """The forwards of one student update with its fake-score updates."""
    fake_updates, batch = training.fake_updates - 1, training.batch_size
    guided = 2 if config.teacher.guidance > 1 else 1
    student_backward = 2 if config.student.form == "full" else 1
    return batch * (fake_updates * (1 + 2) + 1 + guided + 2 + student_backward)


def count_warmup(training: Training) -> float:
    """The forwards of one update of the warm-up: a rollout, K steps of the fake score, and the teacher once."""
    return training.batch_size * ((training.fake_updates - 1 or 1) + 3 * training.fake_updates + 1)


def count_evaluations(config: Config) -> dict[str, int]:
    """The network evaluations (NFE) for an image of each compared model."""
    student, teacher, nfe = config.student.steps, config.teacher, {}
    for model in config.evaluate.models:
        nfe[model] = _count_nfe(teacher.steps, teacher.guidance) if model == "teacher" else student
    return nfe | {name: _count_nfe(each.steps, each.guidance_scale) for name, each in config.evaluate.pipelines.items()}


def _count_nfe(steps: int, guidance_scale: float) -> int:
    return steps * (2 if guidance_scale > 1 else 1)
