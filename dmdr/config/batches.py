"""Whether several processes can share the batches of a training stage: arithmetic on its settings, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmdr.config.training import DPO, GRPO, AnyRL, Joint, Training
from dmdr.errors import ConfigError


@dataclass(frozen=True)
class Rollout:
    """What an RL algorithm asks of a rollout; the defaults are those of training without groups.

    group_size: images of one prompt. oversampling: trajectories rolled out for each one that is trained on.
    inner_updates: student updates on one rollout. block: trajectories whose states of one step stand in one batch.
    """

    group_size: int = 1
    oversampling: float = 1.0
    inner_updates: int = 1
    block: int = 1


def describe_rollout(rl: AnyRL | None) -> Rollout:
    """What the RL of a stage asks of its rollouts; None: it has no RL."""
    if isinstance(rl, DPO):
        return Rollout(rl.group_size, oversampling=rl.group_size / 2, block=2)
    if isinstance(rl, GRPO):
        return Rollout(rl.group_size, inner_updates=rl.inner_updates)
    return Rollout()


def count_trajectories(
    batch_size: int, fake_updates: int, steps: int, *, group_size: int = 1, student_batches: float = 1.0
) -> int:
    """How many trajectories a training step rolls out so that their states suffice, in whole groups.

    ceil(B max(K - 1, student_batches) / N). student_batches: batches rolled out for the student, unused ones included.
    """
    needed = math.ceil(max(fake_updates - 1, student_batches) * batch_size / steps)
    return math.ceil(needed / group_size) * group_size


def check_split(
    stage: str, training: Training, rl: AnyRL | None, *, steps: int, ranks: int, micro_batch: int | None
) -> None:
    """Check that every rank has something to do in every part of an update.

    steps: of the student. micro_batch: the most samples that a network sees at once; None: all.

    Raises:
        ConfigError: it has not.
    """
    size, rollout = training.batch_size, describe_rollout(rl)
    group, block = rollout.group_size, rollout.block
    student_batches = rollout.oversampling * rollout.inner_updates
    prompts = (
        count_trajectories(size, training.fake_updates, steps, group_size=group, student_batches=student_batches)
        // group
    )
    if size // block < ranks:
        in_blocks = f" in blocks of {block}" if block > 1 else ""
        raise ConfigError(
            f"{stage}.batch_size {size} cannot be split over {ranks} processes{in_blocks}; make it "
            f"{ranks * block} or more, or use fewer processes"
        )
    if prompts < ranks:
        noun, in_groups = "prompt" if prompts == 1 else "prompts", f" of {group} images" if group > 1 else ""
        raise ConfigError(
            f"{stage}.batch_size {size} needs {prompts} {noun} an update{in_groups}, fewer than {ranks} processes; "
            "raise it, or use fewer"
        )
    for count, together in ((size // block, block), (prompts, group)):
        most = None if micro_batch is None else max(1, micro_batch // together)
        if count_parts(count, ranks, most) > count // ranks:
            raise ConfigError(
                f"{stage}.batch_size {size} makes {count} to share among {ranks} processes, {count // ranks} for "
                f"some and {count // ranks + 1} for others, which execution.micro_batch_size {micro_batch} cannot "
                f"cut into equally many parts; make batch_size a multiple of {ranks * together}, or the parts larger"
            )
    if rl is not None and isinstance(training, Joint) and training.fake_warmup:  # which rolls out without RL
        check_split(stage, training, None, steps=steps, ranks=ranks, micro_batch=micro_batch)


def count_parts(count: int, ranks: int, most: int | None) -> int:
    """Into how many parts of at most `most` things every rank cuts its share of `count` things. most: None for one."""
    return 1 if most is None else math.ceil(math.ceil(count / ranks) / most)
