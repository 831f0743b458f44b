"""How the samples of an update are counted and shared among processes: arithmetic on settings, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmdr.config.rl import DPO, GRPO, AnyRL, EvolutionStrategies, Policy, Surrogate
from dmdr.config.training import Training
from dmdr.errors import ConfigError


@dataclass(frozen=True)
class RLBatch:
    """What one update of an RL algorithm samples and trains beside distribution matching; the defaults: nothing.

    trajectories: of a rollout of its own. group: images of one prompt in it. states: that the student is trained on, in
    `inner_updates` parts. block: states that stand together. branches: of each state, sampled to the end.
    """

    trajectories: int = 0
    group: int = 1
    states: int = 0
    inner_updates: int = 1
    block: int = 1
    branches: int = 0


def count_rl(rl: AnyRL | None, steps: int) -> RLBatch:
    """What an update of this RL asks for. steps: of the student. ReFL shares the student's update: nothing."""
    if isinstance(rl, EvolutionStrategies):
        return RLBatch(states=rl.states)
    if not isinstance(rl, Policy):
        return RLBatch()
    inner = rl.inner_updates if isinstance(rl, GRPO) else 1
    if rl.branches:
        return RLBatch(states=rl.states, inner_updates=inner, branches=rl.branches)
    if isinstance(rl, DPO):
        return RLBatch(rl.batch, rl.group_size, states=2 * (rl.batch // rl.group_size) * (steps - 1), block=2)
    return RLBatch(rl.batch, rl.group_size, states=rl.batch * (steps - 1), inner_updates=inner)


def spread_states(states: int, steps: int) -> tuple[int, int]:
    """How many states each of `steps` steps has for sure, and how many steps have one more."""
    return divmod(states, steps)


def count_student_forwards(rl: AnyRL | None, steps: int) -> float:
    """How many samples pass through the student, without gradients, for the RL of one update: rollout and branches.

    A branch at step k of N = `steps` runs N - 1 - k more steps, so on average over the steps 0 .. N - 2 it is N / 2.
    """
    asked = count_rl(rl, steps)
    hybrid = isinstance(rl, GRPO) and rl.hybrid  # an N-th of its states stands at the last step and does not branch
    branching = asked.states * (1 - 1 / steps) if hybrid else asked.states
    return asked.trajectories * steps + branching * asked.branches * steps / 2


def count_trajectories(batch_size: int, fake_updates: int, steps: int, *, student_batches: int = 1) -> int:
    """How many trajectories a training step rolls out so that their states suffice: ceil(B max(K - 1, student) / N).

    student_batches: of B states, for the student.
    """
    return math.ceil(max(fake_updates - 1, student_batches) * batch_size / steps)


def check_split(
    stage: str, training: Training, rl: AnyRL | None, *, steps: int, ranks: int, micro_batch: int | None
) -> None:
    """Check that every rank has something to do in every part of an update.

    steps: of the student. micro_batch: the most samples that a network sees at once; None: all.

    Raises:
        ConfigError: it has not.
    """
    size = training.batch_size
    prompts = count_trajectories(size, training.fake_updates, steps)
    if size < ranks:
        raise ConfigError(
            f"{stage}.batch_size {size} cannot be split over {ranks} processes; make it {ranks} or more, or use fewer "
            "processes"
        )
    if prompts < ranks:
        noun = "prompt" if prompts == 1 else "prompts"
        raise ConfigError(
            f"{stage}.batch_size {size} needs {prompts} {noun} an update, fewer than {ranks} processes; raise it, or "
            "use fewer"
        )
    if count_parts(size, ranks, micro_batch) > size // ranks:
        raise ConfigError(
            f"{stage}.batch_size {size} is to be shared among {ranks} processes, {size // ranks} for "
            f"some and {size // ranks + 1} for others, which execution.micro_batch_size {micro_batch} cannot "
            f"cut into equally many parts; make batch_size a multiple of {ranks}, or the parts larger"
        )
    if isinstance(rl, EvolutionStrategies) and rl.states > prompts * steps:
        raise ConfigError(
            f"{stage}.rl.states {rl.states} is more than the {prompts * steps} states of an update's rollout; make it "
            f"{prompts * steps} or less, or raise {stage}.rl.pairs instead"
        )
    if rl is not None:
        check_rl_split(stage, rl, steps=steps, ranks=ranks, micro_batch=micro_batch)


def check_rl_split(stage: str, rl: AnyRL, *, steps: int, ranks: int, micro_batch: int | None) -> None:
    """The same for what RL samples and trains on.

    Raises:
        ConfigError: as `check_split`.
    """
    asked = count_rl(rl, steps)
    if isinstance(rl, Surrogate) and rl.samples < ranks:
        raise ConfigError(
            f"{stage}.rl.samples {rl.samples} cannot be shared among {ranks} processes; make it {ranks} or more"
        )
    if not asked.states:
        return
    inner, hybrid = asked.inner_updates, isinstance(rl, GRPO) and rl.hybrid
    if asked.branches:
        key, value, kinds = "states", asked.states, steps if hybrid else steps - 1
        fewest, more = spread_states(asked.states, kinds)
        shared = [(fewest, asked.branches), (fewest + (more > 0), asked.branches)]
    elif not asked.trajectories:
        key, value, kinds, shared = "states", asked.states, 1, []
    else:
        key, value, kinds = "batch", asked.trajectories, asked.group
        shared = [(asked.trajectories // asked.group, asked.group)]
    parts = asked.states // asked.block // inner
    shared += [(parts, asked.block), (parts + (asked.states // asked.block % inner > 0), asked.block)]
    for count, together in shared:
        most = None if micro_batch is None else max(1, micro_batch // together)
        if count < ranks or count_parts(count, ranks, most) > count // ranks:
            least = kinds * ranks * inner
            raise ConfigError(
                f"{stage}.rl.{key} {value} cannot be shared evenly among {ranks} processes in parts of "
                f"{micro_batch or 'any size'}; make it a multiple of {least}, or the parts larger, or use fewer "
                "processes"
            )


def count_parts(count: int, ranks: int, most: int | None) -> int:
    """Into how many parts of at most `most` things every rank cuts its share of `count` things. most: None for one."""
    return 1 if most is None else math.ceil(math.ceil(count / ranks) / most)
