"""The loop of both training stages, and one training step: K - 1 updates of the fake score, then one of the student.

1. Joint training starts from the EMA of the cold start, the weights that were measured, and from its fake score.
2. Where it starts elsewhere, the fake score knows nothing of the student yet. It is trained alone first, for
   `fake_warmup` updates of K steps each, on samples of the student, which does not change.
3. What a step draws (prompts, noise, levels, pairs) depends on (seed, stage, update) alone, never on history.
4. What distribution matching and the fake score see is the same whatever the RL: DPO and GRPO compare whole
   trajectories of a rollout of their own, or branches of the states that are there.
5. RL may begin at update 0 of the cold start, the newer version of the paper in RTDMD's reading (`dmdr.config.rl`).
   Before `rl.start`, a stage computes what it computes without RL, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.batches import RLBatch, count_rl, count_trajectories
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import Training
from dmdr.dyna import real_scale, renoise_beta, renoise_levels
from dmdr.errors import NonFinite, doing
from dmdr.optimizers import learning_rate
from dmdr.promptset.prompts import Prompts
from dmdr.rl.objective import Objective, RLTerm
from dmdr.rollout import States, Window, gather_trajectories, generator_for, noise_for, prompt_order
from dmdr.shared_base import SharedBase
from dmdr.state import Row, TrainState
from dmdr.update import (
    Batch,
    GuidanceLevels,
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
from dmdr.watch.figures import TEACHER_LOSS
from dmdr.watch.watcher import Look, Watcher

RECOVERIES = "watch/recoveries"  # in the rows after the first: how often the watch has taken the stage back


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

    def at(self, update: int) -> Run:
        """This run as it is at an update: without RL before that acts."""
        return self if self.rl is None or update >= self.rl.config.start else replace(self, rl=None)

    @property
    def batch_rl(self) -> RLBatch:
        """What RL samples and trains in an update, beside what distribution matching does."""
        return count_rl(self.rl.config if self.rl else None, len(self.times) - 1)


@dataclass(frozen=True)
class Batches:
    """The states that one training step trains on: a list of parts for each update."""

    fake_score: list[list[Batch]]
    student: list[list[Batch]]


def train(run: Run, state: TrainState, *, stop: Callable[[], bool]) -> Iterator[Row]:
    """Train until the last update, until the watch ends the stage, or until `stop` asks; yield each finished update.

    The watch may take the state back: then the updates after that come again, at lower rates.

    Raises:
        NonFinite: a loss or gradient is not a number; the newest checkpoint is from before it.
        ConfigError, DataError: the watch is to recover, and there is nothing to go back to.
    """
    yield from warm_up(run, state, stop=stop)
    if state.warmup < run.fake_warmup:
        return
    while True:
        is_last = state.has_ended or state.update == run.training.updates
        if not is_last and stop():
            return
        look = run.watch.look(state, last=is_last) if run.watch else Look()
        if run.watch and look.recovery:
            run.watch.remedy.apply(state, look.recovery)
            continue
        if is_last or look.ends_stage:
            if look.figures:
                state.rows.append({"update": state.update, **look.figures})
            return
        with doing(f"training {run.stage}, update {state.update}"):
            figures = training_step(run, state)
        if run.watch and run.watch.recovers_divergence and (broken := find_broken(figures)):
            run.watch.remedy.apply(state, run.watch.plan_divergence(state, look, broken))
            continue
        require_finite(figures, f"{run.stage}: {{}} at update {state.update}")
        made = {RECOVERIES: float(len(state.recoveries))} if state.recoveries else {}
        row = {"update": state.update, **figures, **look.figures, **made}
        state.advance(row)
        yield row


def find_broken(figures: dict[str, float]) -> dict[str, float]:
    """The figures that are not numbers."""
    return {name: value for name, value in figures.items() if not math.isfinite(value)}


def require_finite(figures: dict[str, float], where: str) -> None:
    """Raises NonFinite if a figure is not a number. where: a sentence with {} for the figure and its value."""
    for name, value in find_broken(figures).items():
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
    window, _ = roll_out_prompts(alone, update)
    batches = select_batches(alone, window)
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
    window, window_rl = roll_out_prompts(run, update)
    run = run.at(update)
    batches = select_batches(run, window)
    if run.rl:
        run.rl.algorithm.reward.remember(state.rows)
    objective = run.rl.algorithm.build_objective(window_rl) if run.rl else None
    set_learning_rates(training, state)
    weighted = weigh_objective(run.rl, objective, state) if run.rl and objective else []
    figures: dict[str, torch.Tensor] = {}
    mean_level = torch.zeros(())

    if not run.distribution_matching:
        for each in weighted:
            figures = update_student_by_rl(run.base, batches.student[0], state.student, each)
        return to_floats({**(objective.figures if objective else {}), **figures})

    scale = real_scale(update, training.dynamic)
    real_score = RealScore(run.unconditional, draw_guidance(run, update), scale, training.dm_floor)
    for number, parts in enumerate(batches.fake_score):
        update_fake_score(run.base, parts, draw_levels(run, update, number, parts[0].of), state.fake_score)
    for inner, parts in enumerate(batches.student):
        number = len(batches.fake_score) + inner
        levels = draw_levels(run, update, number, parts[0].of)
        levels = replace(levels, cfg=draw_guidance_levels(run, update, number, parts[0].of))
        rl = weighted[inner] if weighted else None
        lag = measure_lag(run, state, parts, levels) if inner == len(batches.student) - 1 else {}
        figures = update_student(
            run.base, parts, levels, real_score, student=state.student, fake_score=state.fake_score, rl=rl
        )
        figures |= lag
        mean_level = levels.t.mean()
        state.rl_weight = float(figures.get("rl_weight", 0.0))
    figures = {**figures, **(objective.figures if objective else {}), "renoise_mean": mean_level}
    return {**to_floats(figures), "real_scale": scale}


def set_learning_rates(training: Training, state: TrainState) -> None:
    """The rates of this update, as far as no recovery has halved them."""
    update, updates = state.update, training.updates
    state.student.set_learning_rate(learning_rate(training.student, update, updates) * state.slow_down("student"))
    fake_rate = learning_rate(training.fake_score, update, updates)
    state.fake_score.set_learning_rate(fake_rate * state.slow_down("fake_score"))


def measure_lag(run: Run, state: TrainState, parts: list[Batch], levels: Levels) -> dict[str, torch.Tensor]:
    """What the watch compares the fake score's loss with: the bare teacher's on the same samples, before a look."""
    if run.watch is None or not run.watch.is_due(state.update + 1):
        return {}
    return {TEACHER_LOSS: measure_teacher_loss(run.base, parts, levels)["loss_teacher"]}


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


def draw_guidance_levels(run: Run, update: int, number: int, count: int) -> GuidanceLevels | None:
    """Where the `number`-th update of a training step takes the CFG of the real score, uniformly; None: not apart."""
    training, backbone = run.training, run.base.backbone
    if training.decoupled is None:
        return None
    low, high = (max(end, backbone.path.lowest) for end in training.renoise_range)
    generator = generator_for(run.seed, run.stage, "guidance levels", update, number)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    shape = (count, *backbone.latent_shape)
    noise = noise_for(run.seed, run.stage, "guidance renoise", update, number, shape=shape)
    return GuidanceLevels(share, noise, (low, high), below=training.decoupled == "below")


def weigh_objective(rl: RLTerm, objective: Objective, state: TrainState) -> list[WeightedLoss]:
    """The RL loss of each inner update at its weight, clipped apart where its states are or its weight is matched."""
    balance = state.balance if objective.batches or rl.config.weight_is == "matched" else None
    batches: list[list[Batch] | None] = [*objective.batches] or [None]
    trust = objective.trust * rl.config.weight_share(state.update) * state.slow_down("rl")
    return [WeightedLoss(objective.loss, rl.config.weight, each, balance, trust) for each in batches]


def roll_out_prompts(run: Run, update: int) -> tuple[Window, Window]:
    """The rollout of a training step, and the one that RL looks at: the same, or one of its own.

    RL alone has no other rollout than its own. The prompts of both are asked for at once.
    """
    after, run = run.at(update + 1), run.at(update)
    indices, own = list_prompts(run, update)
    records = run.prompts.records([*indices, *own])
    items = run.prompts.items([*indices, *own])
    if update + 1 < run.training.updates:
        run.prepare([index for each in list_prompts(after, update + 1) for index in each])
    first, group = len(indices), run.batch_rl.group
    windows = []
    if indices:
        windows.append(roll_out_window(run, run.stage, update, items[:first], records[:first], group=1))
    if own:
        windows.append(roll_out_window(run, f"{run.stage} rl", update, items[first:], records[first:], group=group))
    return windows[0], windows[-1]


def roll_out_window(
    run: Run, stage: str, update: int, items: list[Item], records: list[PromptRecord], *, group: int
) -> Window:
    """N states of a trajectory for each item; `stage` names what is drawn for them.

    Each rank rolls out the trajectories of its share of the groups; then every rank has all states.
    """
    backbone, groups = run.base.backbone, len(items) // group
    c = backbone.collate(items)
    shape = (len(run.times) - 1, len(items), *backbone.latent_shape)
    noises = noise_for(run.seed, stage, "rollout", update, shape=shape)
    most = None if run.micro_batch is None else max(1, run.micro_batch // group)
    parts = []
    for chunk in distributed.split_batches(distributed.split_evenly(groups), groups, most):
        part = slice(chunk.start * group, chunk.stop * group)
        c_part = {key: value[part] for key, value in c.items()}
        parts.append(roll_out(run.base, c_part, times=run.times, noises=noises[:, part].to(run.times), eta=run.eta))
    x_t = gather_trajectories([part.x_t for part in parts])
    x0 = gather_trajectories([part.x0 for part in parts])
    states = States(run.times[:-1], x_t, x0)
    return Window(states, c, records, run.times, run.eta, run.seed, stage, update, run.micro_batch)


def list_prompts(run: Run, update: int) -> tuple[list[int], list[int]]:
    """The indices of the prompts of each trajectory that an update rolls out, and of each that RL rolls out."""
    own, total = run.batch_rl, len(run.prompts)
    groups = own.trajectories // own.group
    needed = run.distribution_matching or not groups
    count = count_window(run) if needed else 0
    order_rl = prompt_order(run.seed, f"{run.stage} rl", update * groups, groups, total)
    return (
        prompt_order(run.seed, run.stage, update * count, count, total),
        [index for index in order_rl for _ in range(own.group)],
    )


def count_window(run: Run) -> int:
    """The trajectories of a training step, without those of RL's own."""
    training, steps = run.training, len(run.times) - 1
    return count_trajectories(
        training.batch_size, training.fake_updates, steps, student_batches=run.batch_rl.inner_updates
    )


def select_batches(run: Run, window: Window) -> Batches:
    """K - 1 batches of B states for the fake score, then one of the student for each of its updates."""
    batch_size, (steps, count) = run.training.batch_size, window.states.x0.shape[:2]

    def shuffle(name: str) -> tuple[torch.Tensor, ...]:  # so that no batch is one prompt at N steps
        return torch.randperm(steps * count, generator=window.generator(name)).split(batch_size)

    def select(pairs: torch.Tensor) -> list[Batch]:
        return select_states(window.states, window.c, pairs, most=run.micro_batch)

    return Batches(
        fake_score=[select(pairs) for pairs in shuffle("fake pairs")[: run.training.fake_updates - 1]],
        student=[select(pairs) for pairs in shuffle("student pairs")[: run.batch_rl.inner_updates]],
    )
