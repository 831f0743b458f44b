"""The loop of both training stages, and one training step: K - 1 updates of the fake score, then one of the student.

1. Joint training starts from the EMA of the cold start, the weights that were measured, and from its fake score.
2. Where it starts elsewhere, the fake score knows nothing of the student yet. It is trained alone first, for
   `fake_warmup` updates of K steps each, on samples of the student, which does not change.
3. What a step draws (prompts, noise, levels, pairs) depends on (seed, stage, update) alone, never on history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning
from dmdr.config.batches import count_trajectories
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import Training
from dmdr.dyna import real_scale, renoise_beta, renoise_levels
from dmdr.errors import NonFinite, doing
from dmdr.hacking_alarm import Look, Row, Watcher
from dmdr.optimizers import learning_rate
from dmdr.promptset.prompts import Prompts
from dmdr.rl.objective import Objective, RLTerm
from dmdr.rollout import States, generator_for, noise_for
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.update import (
    Batch,
    Levels,
    RealScore,
    WeightedLoss,
    measure_teacher_loss,
    roll_out,
    select_states,
    update_fake_score,
    update_student,
    update_student_by_rl,
)


@dataclass(frozen=True)
class Run:
    """What stays the same through a training stage.

    unconditional: the conditioning of the empty prompt, a batch of one. times: (N + 1,) of the student. eta: of its
    rollouts. guidance_scale: of the real score, or a range (low, high) from which each update draws it.
    micro_batch: the most samples that a network sees at once; None: all. fake_warmup: updates of the fake score alone
    that come first. prepare: told the indices of the prompts whose items the next update will ask for.
    """

    stage: str
    seed: int
    training: Training
    base: SharedBase
    prompts: Prompts
    unconditional: Conditioning
    times: torch.Tensor
    guidance_scale: float | tuple[float, float]
    eta: float = 1.0
    rl: RLTerm | None = None
    distribution_matching: bool = True
    watch: Watcher | None = None
    micro_batch: int | None = None
    fake_warmup: int = 0
    prepare: Callable[[list[int]], object] = lambda indices: None


@dataclass(frozen=True)
class Batches:
    """The states that one training step trains on: a list of parts for each update."""

    fake_score: list[list[Batch]]
    student: list[list[Batch]]


def train(run: Run, state: TrainState, *, stop: Callable[[], bool]) -> Iterator[Row]:
    """Train until the last update, until the watch ends the stage, or until `stop` asks; yield each finished update.

    Raises:
        NonFinite: a loss or gradient is not a number; the newest checkpoint is from before it.
    """
    yield from warm_up(run, state, stop=stop)
    if state.warmup < run.fake_warmup:
        return
    while True:
        is_last = state.update == run.training.updates
        if not is_last and stop():
            return
        look = run.watch.look(state, last=is_last) if run.watch else Look()
        if is_last or look.ends_stage:
            if look.figures:
                state.rows.append({"update": state.update, **look.figures})
            return
        with doing(f"training {run.stage}, update {state.update}"):
            figures = training_step(run, state)
        require_finite(figures, f"{run.stage}: {{}} at update {state.update}")
        row = {"update": state.update, **figures, **look.figures}
        state.advance(row)
        yield row


def require_finite(figures: dict[str, float], where: str) -> None:
    """Raises NonFinite if a figure is not a number. where: a sentence with {} for the figure and its value."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise NonFinite(
                f"{where.format(f'{name} is {value}')}; the last checkpoint is whole: lower the learning rates "
                "(fake_score first) or the RL weight"
            )


def warm_up(run: Run, state: TrainState, *, stop: Callable[[], bool]) -> Iterator[Row]:
    """Train the fake score alone for `run.fake_warmup` updates, or until `stop` asks; yield each finished one.

    Their rows count up to the first student update: -3, -2, -1.

    Raises:
        NonFinite: as `train`.
    """
    while state.warmup < run.fake_warmup and not stop():
        number = state.warmup - run.fake_warmup
        with doing(f"training the fake score of {run.stage} alone, update {state.warmup} of {run.fake_warmup}"):
            figures = warmup_step(run, state)
        require_finite(figures, f"{run.stage}: {{}} at update {state.warmup} of the fake score alone")
        row = {"update": number, **figures}
        state.warmup += 1
        state.rows.append(row)
        yield row


def warmup_step(run: Run, state: TrainState) -> dict[str, float]:
    """K steps of the fake score on one rollout of the student, at the rates and levels of the first student update.

    The figures are of the first of them: samples that nothing was trained on yet. `loss_teacher` is the bare teacher's
    loss on the same samples.
    """
    training, update = run.training, state.warmup
    changes = {"dynamic": training.dynamic.model_copy(update={"schedule": "constant"}), "updates": run.fake_warmup}
    alone = replace(run, stage=f"{run.stage} warm-up", rl=None, training=training.model_copy(update=changes))
    states, c, _ = roll_out_prompts(alone, update)
    batches = select_batches(alone, update, states, c, None)
    state.fake_score.set_learning_rate(training.fake_score.learning_rate)
    figures: dict[str, torch.Tensor] = {}
    for number, parts in enumerate([*batches.fake_score, *batches.student]):
        levels = draw_levels(alone, update, number, parts[0].of)
        teacher = measure_teacher_loss(run.base, parts, levels) if number == 0 else {}
        found = update_fake_score(run.base, parts, levels, state.fake_score)
        figures = figures or {**found, **teacher}
    return to_floats(figures)


def training_step(run: Run, state: TrainState) -> dict[str, float]:
    """Roll out, update the fake score K - 1 times, then student and fake score together; return the figures."""
    training, update = run.training, state.update
    states, c, records = roll_out_prompts(run, update)
    if run.rl:
        run.rl.algorithm.reward.remember(state.rows)
    objective = run.rl.algorithm.build_objective(states, records, update=update) if run.rl else None
    batches = select_batches(run, update, states, c, objective)
    state.student.set_learning_rate(learning_rate(training.student, update, training.updates))
    state.fake_score.set_learning_rate(learning_rate(training.fake_score, update, training.updates))
    rl = weigh_objective(run.rl, objective, state) if run.rl and objective else None
    figures: dict[str, torch.Tensor] = {}
    mean_level = torch.zeros(())

    if not run.distribution_matching:
        assert rl is not None, "the config refuses a joint stage that trains nothing"
        for parts in batches.student:
            figures = update_student_by_rl(run.base, parts, state.student, rl)
        return to_floats({**(objective.figures if objective else {}), **figures})

    scale = real_scale(update, training.dynamic)
    real_score = RealScore(run.unconditional, draw_guidance(run, update), scale, training.dm_floor)
    for number, parts in enumerate(batches.fake_score):
        update_fake_score(run.base, parts, draw_levels(run, update, number, parts[0].of), state.fake_score)
    for number, parts in enumerate(batches.student, start=len(batches.fake_score)):
        rl = weigh_objective(run.rl, objective, state) if run.rl and objective else None
        levels = draw_levels(run, update, number, parts[0].of)
        figures = update_student(
            run.base, parts, levels, real_score, student=state.student, fake_score=state.fake_score, rl=rl
        )
        mean_level = levels.t.mean()
        if rl is not None:
            state.rl_weight = float(figures["rl_weight"])
    figures = {**figures, **(objective.figures if objective else {}), "renoise_mean": mean_level}
    return {**to_floats(figures), "real_scale": scale}


def to_floats(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """Figures as numbers."""
    return {name: float(value) for name, value in figures.items()}


def draw_guidance(run: Run, update: int) -> float:
    """The guidance scale of a training step: the run's, or one drawn uniformly from its range."""
    if not isinstance(run.guidance_scale, tuple):
        return run.guidance_scale
    low, high = run.guidance_scale
    uniform = torch.rand((), generator=generator_for(run.seed, run.stage, "guidance", update), dtype=torch.float64)
    return low + (high - low) * float(uniform)


def draw_levels(run: Run, update: int, number: int, count: int) -> Levels:
    """The renoise levels and noise of the `number`-th update of a training step, for its global batch."""
    training = run.training
    beta = renoise_beta(update, training.dynamic)
    t = renoise_levels(
        beta, training.renoise_range, count, generator_for(run.seed, run.stage, "levels", update, number)
    )
    backbone = run.base.backbone
    t, shape = t.clamp(min=backbone.path.lowest), (count, *backbone.latent_shape)
    return Levels(t, noise_for(run.seed, run.stage, "renoise", update, number, shape=shape))


def weigh_objective(rl: RLTerm, objective: Objective, state: TrainState) -> WeightedLoss:
    """The RL loss at its weight. `matched` sets the weight at the first update that has an RL gradient."""
    if rl.config.weight_is == "fixed":
        return WeightedLoss(objective.loss, rl.config.weight)
    if state.rl_weight:
        return WeightedLoss(objective.loss, state.rl_weight)
    return WeightedLoss(objective.loss, rl.config.weight, matched=True)


def roll_out_prompts(run: Run, update: int) -> tuple[States, Conditioning, list[PromptRecord]]:
    """The rollout of one training step: N states of M trajectories, their conditioning and the record of each prompt.

    Each rank rolls out the trajectories of its share of the prompts; then every rank has all states.
    """
    steps, (prompts, group) = len(run.times) - 1, count_groups(run)
    count = prompts * group
    indices = list_prompts(run, update)
    backbone = run.base.backbone
    c = backbone.collate(run.prompts.items(indices))
    if update + 1 < run.training.updates:
        run.prepare(list_prompts(run, update + 1))
    noises = noise_for(run.seed, run.stage, "rollout", update, shape=(steps, count, *backbone.latent_shape))
    parts = []
    for chunk in distributed.split_batches(distributed.split_evenly(prompts), prompts, most_together(run, group)):
        part = slice(chunk.start * group, chunk.stop * group)
        c_part = {key: value[part] for key, value in c.items()}
        parts.append(roll_out(run.base, c_part, times=run.times, noises=noises[:, part].to(run.times), eta=run.eta))
    x_t = gather_trajectories([part.x_t for part in parts])
    x0 = gather_trajectories([part.x0 for part in parts])
    return States(run.times[:-1], x_t, x0), c, run.prompts.records(indices)


def list_prompts(run: Run, update: int) -> list[int]:
    """The index of the prompt of each trajectory that an update rolls out."""
    prompts, group = count_groups(run)
    order = prompt_order(run.seed, run.stage, update * prompts, prompts, len(run.prompts))
    return [index for index in order for _ in range(group)]


def gather_trajectories(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join the parts (N, m, C, H, W) of all ranks along their trajectories: (N, M, C, H, W)."""
    return distributed.all_gather(torch.cat(parts, dim=1).transpose(0, 1)).transpose(0, 1)


def most_together(run: Run, size: int) -> int | None:
    """How many groups of `size` samples fit into the micro batch, at least one; None for all of them."""
    return None if run.micro_batch is None else max(1, run.micro_batch // size)


def count_groups(run: Run) -> tuple[int, int]:
    """How many prompts a training step rolls out, and how many trajectories of each."""
    group, student_batches = 1, 1.0
    if run.rl is not None:
        algorithm = run.rl.algorithm
        group, student_batches = algorithm.group_size, algorithm.oversampling * algorithm.inner_updates
    count = count_trajectories(
        run.training.batch_size,
        run.training.fake_updates,
        len(run.times) - 1,
        group_size=group,
        student_batches=student_batches,
    )
    return count // group, group


def select_batches(run: Run, update: int, states: States, c: Conditioning, objective: Objective | None) -> Batches:
    """K - 1 batches of B states for the fake score, then those of the student, whose blocks stay together."""
    batch_size, (steps, count) = run.training.batch_size, states.x0.shape[:2]
    inner_updates = run.rl.algorithm.inner_updates if run.rl else 1
    blocks = torch.arange(count)[:, None] if objective is None else objective.blocks

    def shuffle(name: str, total: int) -> torch.Tensor:  # so that no batch is one prompt at N steps
        return torch.randperm(total, generator=generator_for(run.seed, run.stage, name, update))

    fake_pairs = shuffle("fake pairs", steps * count).split(batch_size)[: run.training.fake_updates - 1]
    order = shuffle("student pairs", steps * len(blocks))
    step, block = order // len(blocks), order % len(blocks)
    student_pairs = (step[:, None] * count + blocks[block]).flatten().split(batch_size)[:inner_updates]
    size = blocks.shape[1]
    return Batches(
        fake_score=[select_states(states, c, pairs, most=run.micro_batch) for pairs in fake_pairs],
        student=[select_states(states, c, pairs, block=size, most=run.micro_batch) for pairs in student_pairs],
    )


def prompt_order(seed: int, stage: str, start: int, count: int, total: int) -> list[int]:
    """Positions start .. start + count of an endless shuffled reading of `total` prompts, each once an epoch."""
    order: list[int] = []
    permutation = torch.empty(0, dtype=torch.int64)
    for position in range(start, start + count):
        epoch, index = divmod(position, total)
        if not order or index == 0:
            permutation = torch.randperm(total, generator=generator_for(seed, stage, "order", epoch))
        order.append(int(permutation[index]))
    return order
