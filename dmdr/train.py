"""The loop of both training stages: K - 1 updates of the fake score, then one of the student with the K-th.

1. Joint training starts from the EMA of the cold start, the weights that were measured, and from its fake score.
2. What an update draws (prompts, noise, levels, pairs) depends on (seed, stage, update) alone, never on history.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr import distributed, optimizers
from dmdr.backbones.protocol import Conditioning
from dmdr.config.run import RL, Training
from dmdr.dyna import real_scale, renoise_beta, renoise_levels
from dmdr.errors import ConfigError, NonFinite
from dmdr.hacking_alarm import Seen, Watcher
from dmdr.promptset import PromptSet
from dmdr.rl.objective import Algorithm, Objective
from dmdr.rollout import States, generator_for, noise_for
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.update import (
    Batch,
    Renoise,
    Weighted,
    count_trajectories,
    roll_out,
    select_states,
    update_fake_score,
    update_student,
    update_student_by_rl,
)


@dataclass(frozen=True)
class Run:
    """What stays the same through a training stage. rl: an algorithm and its weight."""

    stage: str
    seed: int
    training: Training
    base: SharedBase
    prompts: PromptSet
    unconditional: Conditioning
    times: torch.Tensor
    guidance_scale: float
    rl: tuple[Algorithm, RL] | None = None
    distribution_matching: bool = True
    watch: Watcher | None = None
    micro_batch: int | None = None  # the most samples that a network is given at once; None: all


def train(
    run: Run,
    state: TrainState,
    *,
    checkpoint: Callable[[bool], None],
    report: Callable[[dict[str, float]], None],
    stop: Callable[[], bool],
) -> bool:
    """Train until `training.updates` are done or the watch ends it: True; False when `stop` asked to leave before that.

    `checkpoint(now)` is called after each update; now is True on leaving early.

    Raises:
        NonFinite: a loss or gradient is not a number; the newest checkpoint is from before it.
    """
    while True:
        done = state.update == run.training.updates
        if not done and stop():
            checkpoint(True)
            return False
        started = time.monotonic()
        seen = run.watch.look(state, last=done) if run.watch else Seen({}, stop=False)
        if done or seen.stop:
            state.rows += [{"update": state.update, **seen.figures}] if seen.figures else []
            return True
        row = training_step(run, state)
        for name, value in row.items():
            if not math.isfinite(value):
                raise NonFinite(
                    f"{run.stage}: {name} is {value} at update {state.update}; the last checkpoint is whole: "
                    "lower the learning rates (fake_score first) or the RL weight"
                )
        row = {"update": state.update, **row, **seen.figures}
        state.advance(row)
        report({**row, "seconds": time.monotonic() - started})
        checkpoint(False)


def training_step(run: Run, state: TrainState) -> dict[str, float]:
    """One window of `dmdr.update`; returns its figures."""
    training, update = run.training, state.update
    states, c, texts = roll_out_prompts(run, update)
    objective = run.rl[0].build_objective(states, texts) if run.rl else None
    fake_batches, student_batches = select_batches(run, update, states, c, objective)
    beta = renoise_beta(update, training.dynamic)
    scale = real_scale(update, training.dynamic)
    student, fake_score = state.optimizers["student"], state.optimizers["fake_score"]
    for optimizer, config in ((student, training.student), (fake_score, training.fake_score)):
        for group in optimizer.param_groups:
            group["lr"] = optimizers.learning_rate(config, update, training.updates)

    def renoise(part: int, count: int) -> Renoise:
        generator = generator_for(run.seed, run.stage, "levels", update, part)
        t = renoise_levels(beta, training.renoise_range, count, generator)
        return Renoise(
            t, noise_for(run.seed, run.stage, "renoise", update, part, shape=(count, *run.base.backbone.latent_shape))
        )

    if not run.distribution_matching:
        rl = Weighted(objective.loss, run.rl[1].weight)
        for batches in student_batches:
            figures = update_student_by_rl(run.base, batches, student, rl, clip=training.student.clip)
        return {name: float(value) for name, value in {**objective.figures, **figures}.items()}

    for part, batches in enumerate(fake_batches):
        levels = renoise(part, batches[0].of)
        update_fake_score(run.base, batches, levels, fake_score, clip=training.fake_score.clip)
    for part, batches in enumerate(student_batches, start=len(fake_batches)):
        levels = renoise(part, batches[0].of)
        figures = update_student(
            run.base,
            batches,
            run.unconditional,
            levels,
            (student, fake_score),
            guidance_scale=run.guidance_scale,
            real_scale=scale,
            rl=weigh_objective(run.rl[1], objective, state) if run.rl else None,
            clips=(training.student.clip, training.fake_score.clip),
        )
        if run.rl:
            state.rl_weight = float(figures["rl_weight"])
    figures = {**figures, **(objective.figures if objective else {}), "renoise_mean": levels.t.mean()}
    return {**{name: float(value) for name, value in figures.items()}, "real_scale": scale}


def weigh_objective(config: RL, objective: Objective, state: TrainState) -> Weighted:
    """The RL term at its weight, which `matched` settles at the first update that has an RL gradient."""
    if config.weight_is == "fixed":
        return Weighted(objective.loss, config.weight)
    return Weighted(objective.loss, state.rl_weight or config.weight, matched=not state.rl_weight)


def roll_out_prompts(run: Run, update: int) -> tuple[States, Conditioning, list[str]]:
    """The rollout of one window: N states of M trajectories, their conditioning and the text of each.

    Each rank rolls out the trajectories of its share of the prompts; then all have all states.
    """
    steps, (prompts, group) = len(run.times) - 1, count_groups(run)
    count = prompts * group
    order = prompt_order(run.seed, run.stage, update * prompts, prompts, len(run.prompts))
    indices = [index for index in order for _ in range(group)]
    backbone = run.base.backbone
    c = backbone.collate(run.prompts.items(indices))
    noises = noise_for(run.seed, run.stage, "rollout", update, shape=(steps, count, *backbone.latent_shape))
    most = run.micro_batch and max(1, run.micro_batch // group)
    parts = []
    for whole in distributed.split_batches(distributed.split_evenly(prompts), prompts, most):
        part = slice(whole.start * group, whole.stop * group)
        c_part = {key: value[part] for key, value in c.items()}
        parts.append(roll_out(run.base, c_part, run.times, noises[:, part].to(run.times)))
    x_t, x0 = (
        distributed.all_gather(torch.cat([getattr(part, name) for part in parts], dim=1).transpose(0, 1)).transpose(
            0, 1
        )
        for name in ("x_t", "x0")
    )
    return States(run.times[:-1], x_t, x0), c, [record["prompt"] for record in run.prompts.records(indices)]


def count_groups(run: Run) -> tuple[int, int]:
    """How many prompts a window rolls out, and how many trajectories of each."""
    group, spare = (run.rl[0].group_size, run.rl[0].oversampling * run.rl[0].inner_updates) if run.rl else (1, 1.0)
    count = count_trajectories(
        run.training.batch_size, run.training.fake_updates, len(run.times) - 1, group_size=group, student_batches=spare
    )
    return count // group, group


def check_split(run: Run) -> None:
    """Whether every rank has something to do in every part of an update.

    Raises:
        ConfigError: it has not.
    """
    ranks, size, (prompts, group) = distributed.ranks(), run.training.batch_size, count_groups(run)
    block = run.rl[0].block if run.rl else 1
    if size // block < ranks:
        raise ConfigError(
            f"{run.stage}.batch_size {size} cannot be split over {ranks} processes"
            f"{f' in blocks of {block}' if block > 1 else ''}; make it {ranks * block} or more, or use fewer processes"
        )
    if prompts < ranks:
        raise ConfigError(
            f"{run.stage}.batch_size {size} needs {prompts} {'prompt' if prompts == 1 else 'prompts'} an update"
            f"{f' of {group} images' if group > 1 else ''}, fewer than {ranks} processes; raise it, or use fewer"
        )
    for count, together in ((size // block, block), (prompts, group)):
        most = run.micro_batch and max(1, run.micro_batch // together)
        if len(distributed.split_batches(slice(0, 0), count, most)) > count // ranks:
            raise ConfigError(
                f"{run.stage}.batch_size {size} makes {count} to share among {ranks} processes, {count // ranks} for "
                f"some and {count // ranks + 1} for others, which execution.micro_batch_size {run.micro_batch} cannot "
                f"cut into equally many parts; make batch_size a multiple of {ranks * together}, or the parts larger"
            )


def select_batches(
    run: Run, update: int, states: States, c: Conditioning, objective: Objective | None
) -> tuple[list[list[Batch]], list[list[Batch]]]:
    """K - 1 batches of B states for the fake score, then those of the student, in its objective's blocks; each in
    parts."""
    batch_size, (steps, count) = run.training.batch_size, states.x0.shape[:2]
    inner = run.rl[0].inner_updates if run.rl else 1
    blocks = torch.arange(count)[:, None] if objective is None else objective.blocks
    kept = 1, blocks.shape[1]  # together on one rank, of the fake score and of the student

    def shuffled(name: str, total: int) -> torch.Tensor:  # so that no batch is one prompt at N steps
        return torch.randperm(total, generator=generator_for(run.seed, run.stage, name, update))

    fake_pairs = shuffled("fake pairs", steps * count).split(batch_size)[: run.training.fake_updates - 1]
    order = shuffled("student pairs", steps * len(blocks))
    step, block = order // len(blocks), order % len(blocks)
    student_pairs = (step[:, None] * count + blocks[block]).flatten().split(batch_size)[:inner]
    both = zip((fake_pairs, student_pairs), kept, strict=True)
    return tuple(
        [select_states(states, c, pairs, block=block, most=run.micro_batch) for pairs in each] for each, block in both
    )


def prompt_order(seed: int, stage: str, start: int, count: int, total: int) -> list[int]:
    """Positions start .. start + count of an endless shuffled reading of `total` prompts, each once an epoch."""
    order = []
    for position in range(start, start + count):
        epoch, index = divmod(position, total)
        if not order or index == 0:
            permutation = torch.randperm(total, generator=generator_for(seed, stage, "order", epoch))
        order.append(int(permutation[index]))
    return order
