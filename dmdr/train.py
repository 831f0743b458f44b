"""The loop of both training stages, and one training step: K - 1 updates of the fake score, then one of the student.

1. Joint training starts from the EMA of the cold start, the weights that were measured, and from its fake score.
2. Where it starts elsewhere, the fake score knows nothing of the student yet. It is trained alone first, for
   `fake_warmup` updates of K steps each, on samples of the student, which does not change.
3. RL may begin at update 0 of the cold start, the newer version of the paper in RTDMD's reading (`dmdr.config.rl`).
   Before `rl.start`, a stage computes what it computes without RL, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dmdr.config.training import Training
from dmdr.draws import Run, draw_guidance, draw_guidance_levels, draw_levels, roll_out_prompts, select_batches
from dmdr.dyna import real_scale
from dmdr.errors import NonFinite, doing
from dmdr.optimizers import learning_rate
from dmdr.rl.objective import Objective, RLTerm
from dmdr.rollout import Window
from dmdr.state import Row, TrainState
from dmdr.update import (
    Batch,
    Levels,
    RealScore,
    SampleWeights,
    WeightedLoss,
    measure_teacher_loss,
    update_fake_score,
    update_student,
    update_student_by_rl,
)
from dmdr.watch.figures import TEACHER_LOSS
from dmdr.watch.halves import compare_halves
from dmdr.watch.watcher import Look

RECOVERIES = "watch/recoveries"  # in the rows after the first: how often the watch has taken the stage back


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
        levels = draw_levels(alone, update, number, batches.rows[number])
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
    of_rl = {**objective.figures, **measure_halves(run, state, window_rl, objective)} if objective else {}
    figures: dict[str, torch.Tensor] = {}

    if not run.distribution_matching:
        for each in weighted:
            figures = update_student_by_rl(run.base, batches.student[0], state.student, each)
        return to_floats({**of_rl, **figures})

    scale = real_scale(update, training.dynamic)
    real_score = RealScore(run.unconditional, draw_guidance(run, update), scale, training.dm_floor)
    for number, parts in enumerate(batches.fake_score):
        update_fake_score(run.base, parts, draw_levels(run, update, number, batches.rows[number]), state.fake_score)
    for inner, parts in enumerate(batches.student):
        number = len(batches.fake_score) + inner
        levels = draw_levels(run, update, number, batches.rows[number])
        levels = replace(levels, cfg=draw_guidance_levels(run, update, number, batches.rows[number]))
        rl: WeightedLoss | SampleWeights | None = weighted[inner] if weighted else None
        if run.rl and objective and objective.weigh:
            strength = run.rl.config.weight * find_rl_share(run.rl, state)
            rl, of_weights = objective.weigh(parts, batches.rows[number], strength)
            of_rl |= of_weights
        lag = measure_lag(run, state, parts, levels) if inner == len(batches.student) - 1 else {}
        figures = update_student(
            run.base, parts, levels, real_score, student=state.student, fake_score=state.fake_score, rl=rl
        )
        figures |= lag
    found = to_floats({**figures, **of_rl})
    state.balance.settle()
    state.rl_weight = found.get("rl_weight", 0.0)
    return {**found, "real_scale": scale}


def set_learning_rates(training: Training, state: TrainState) -> None:
    """The rates of this update, as far as no recovery has halved them."""
    update, updates = state.update, training.updates
    state.student.set_learning_rate(learning_rate(training.student, update, updates) * state.slow_down("student"))
    fake_rate = learning_rate(training.fake_score, update, updates)
    state.fake_score.set_learning_rate(fake_rate * state.slow_down("fake_score"))


def measure_halves(run: Run, state: TrainState, window: Window, objective: Objective) -> dict[str, torch.Tensor]:
    """What the watch tells of RL's signal, before a look, where RL has states of its own. window: that RL has seen."""
    if run.watch is None or not run.watch.is_due(state.update + 1) or not objective.batches:
        return {}
    state.student.zero_grad()  # of the last update, whose memory the two halves need
    return compare_halves(run.base, window, objective, group=run.batch_rl.group)


def measure_lag(run: Run, state: TrainState, parts: list[Batch], levels: Levels) -> dict[str, torch.Tensor]:
    """What the watch compares the fake score's loss with: the bare teacher's on the same samples, before a look."""
    if run.watch is None or not run.watch.is_due(state.update + 1):
        return {}
    return {TEACHER_LOSS: measure_teacher_loss(run.base, parts, levels)["loss_teacher"]}


def to_floats(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """Figures as numbers. Here, once an update, the CPU waits for the device."""
    return {name: float(value) for name, value in figures.items()}


def weigh_objective(rl: RLTerm, objective: Objective, state: TrainState) -> list[WeightedLoss]:
    """The RL loss of each inner update at its weight, clipped apart where its states are or its weight is matched."""
    if objective.loss is None:
        return []
    balance = state.balance if objective.batches or rl.config.weight_is == "matched" else None
    batches: list[list[Batch] | None] = [*objective.batches] or [None]
    trust = objective.trust * find_rl_share(rl, state)
    return [WeightedLoss(objective.loss, rl.config.weight, each, balance, trust) for each in batches]


def find_rl_share(rl: RLTerm, state: TrainState) -> float:
    """The share of its weight that RL has at this update: its schedule's, halved by each recovery that lowers it."""
    return rl.config.weight_share(state.update) * state.slow_down("rl")
