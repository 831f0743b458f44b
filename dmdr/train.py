"""The loop of both training stages, and one training step: K - 1 updates of the fake score, then one of the student.

1. Joint training starts from the EMA of the cold start, the weights that were measured, and from its fake score.
2. Where it starts elsewhere, the fake score knows nothing of the student yet. It is trained alone first, for
   `fake_warmup` updates of K steps each, on samples of the student, which does not change.
3. What a step draws (prompts, noise, levels, pairs) depends on (seed, stage, update) and the number of a sample alone,
   never on history or on the ranks, each of which draws for its own samples.
4. What distribution matching and the fake score see is the same whatever the RL: DPO and GRPO compare whole
   trajectories of a rollout of their own, or branches of the states that are there.
5. RL may begin at update 0 of the cold start, the newer version of the paper in RTDMD's reading (`dmdr.config.rl`).
   Before `rl.start`, a stage computes what it computes without RL, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning, Item
from dmdr.config.batches import RLBatch, count_rl
from dmdr.config.deal import Deal, share_evenly
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import AnyRL
from dmdr.config.shares import Share, Trajectories, deal_states, find_share
from dmdr.config.training import Training
from dmdr.dyna import real_scale, renoise_beta, renoise_levels
from dmdr.errors import NonFinite, doing
from dmdr.noise import RowNoise, generator_for, uniforms_for
from dmdr.optimizers import learning_rate
from dmdr.promptset.prompts import Prompts
from dmdr.rl.objective import Objective, RLTerm
from dmdr.rollout import States, Window, prompt_order
from dmdr.shared_base import SharedBase
from dmdr.state import Row, TrainState
from dmdr.transfer import send
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
    micro_batch: the most samples that a network sees at once; None: all. rollout_batch: the same in a rollout, which
    keeps no graph; None: micro_batch. fake_warmup: updates of the fake score alone that come first. prepare: told the
    indices of the prompts whose items the next update will ask for. noise: draws what its samples need.
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
    rollout_batch: int | None = None
    fake_warmup: int = 0
    prepare: Callable[[list[int]], object] = lambda indices: None
    noise: RowNoise = field(default_factory=RowNoise)

    def at(self, update: int) -> Run:
        """This run as it is at an update: without RL before that acts."""
        return self if self.rl is None or update >= self.rl.config.start else replace(self, rl=None)

    @property
    def batch_rl(self) -> RLBatch:
        """What RL samples and trains in an update, beside what distribution matching does."""
        return count_rl(self.rl_config, len(self.times) - 1)

    @property
    def rl_config(self) -> AnyRL | None:
        return self.rl.config if self.rl else None

    @property
    def deal(self) -> Deal:
        """How the states of a rollout are dealt to the batches of an update."""
        return deal_states(self.training, self.rl_config, len(self.times) - 1)

    @property
    def share(self) -> Share:
        """What this rank rolls out in an update."""
        return find_share(
            self.training,
            self.rl_config,
            len(self.times) - 1,
            matches=self.distribution_matching,
            ranks=distributed.ranks(),
            rank=distributed.rank(),
        )


@dataclass(frozen=True)
class Batches:
    """The states that one training step trains on: a list of parts for each update.

    rows: for each update, the rows of its batch that this rank has; those of the fake score come first.
    """

    fake_score: list[list[Batch]]
    student: list[list[Batch]]
    rows: list[range]


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
    figures: dict[str, torch.Tensor] = {}

    if not run.distribution_matching:
        for each in weighted:
            figures = update_student_by_rl(run.base, batches.student[0], state.student, each)
        return to_floats({**(objective.figures if objective else {}), **figures})

    scale = real_scale(update, training.dynamic)
    real_score = RealScore(run.unconditional, draw_guidance(run, update), scale, training.dm_floor)
    for number, parts in enumerate(batches.fake_score):
        update_fake_score(run.base, parts, draw_levels(run, update, number, batches.rows[number]), state.fake_score)
    for inner, parts in enumerate(batches.student):
        number = len(batches.fake_score) + inner
        levels = draw_levels(run, update, number, batches.rows[number])
        levels = replace(levels, cfg=draw_guidance_levels(run, update, number, batches.rows[number]))
        rl = weighted[inner] if weighted else None
        lag = measure_lag(run, state, parts, levels) if inner == len(batches.student) - 1 else {}
        figures = update_student(
            run.base, parts, levels, real_score, student=state.student, fake_score=state.fake_score, rl=rl
        )
        figures |= lag
    found = to_floats({**figures, **(objective.figures if objective else {})})
    state.balance.settle()
    state.rl_weight = found.get("rl_weight", 0.0)
    return {**found, "real_scale": scale}


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
    """Figures as numbers. Here, once an update, the CPU waits for the device."""
    return {name: float(value) for name, value in figures.items()}


def draw_guidance(run: Run, update: int) -> float:
    """The guidance scale of a training step: the run's, or one drawn uniformly from its range."""
    if not isinstance(run.guidance_scale, tuple):
        return run.guidance_scale
    low, high = run.guidance_scale
    uniform = torch.rand((), generator=generator_for(run.seed, run.stage, "guidance", update), dtype=torch.float64)
    return low + (high - low) * float(uniform)


def draw_levels(run: Run, update: int, number: int, rows: range) -> Levels:
    """The renoise levels and noise of the `number`-th update of a training step, for these rows of its batch."""
    training, backbone = run.training, run.base.backbone
    beta = renoise_beta(update, training.dynamic)
    uniform = uniforms_for(run.seed, run.stage, "levels", update, number, rows=rows)
    t = renoise_levels(beta, training.renoise_range, uniform).clamp(min=backbone.path.lowest)
    return Levels(t, draw_rows(run, "renoise", update, number, rows))


def draw_guidance_levels(run: Run, update: int, number: int, rows: range) -> GuidanceLevels | None:
    """Where the `number`-th update of a training step takes the CFG of the real score, uniformly; None: not apart."""
    training, backbone = run.training, run.base.backbone
    if training.decoupled is None:
        return None
    low, high = (max(end, backbone.path.lowest) for end in training.renoise_range)
    share = uniforms_for(run.seed, run.stage, "guidance levels", update, number, rows=rows)
    noise = draw_rows(run, "guidance renoise", update, number, rows)
    return GuidanceLevels(share, noise, (low, high), below=training.decoupled == "below")


def draw_rows(run: Run, name: str, update: int, number: int, rows: range) -> torch.Tensor:
    """Noise (rows, C, H, W) of the `number`-th update of a training step, on the CPU."""
    shape = tuple(run.base.backbone.latent_shape)
    return run.noise.draw(run.seed, (run.stage, name), update, (number,), rows=rows, shape=shape)


def weigh_objective(rl: RLTerm, objective: Objective, state: TrainState) -> list[WeightedLoss]:
    """The RL loss of each inner update at its weight, clipped apart where its states are or its weight is matched."""
    balance = state.balance if objective.batches or rl.config.weight_is == "matched" else None
    batches: list[list[Batch] | None] = [*objective.batches] or [None]
    trust = objective.trust * rl.config.weight_share(state.update) * state.slow_down("rl")
    return [WeightedLoss(objective.loss, rl.config.weight, each, balance, trust) for each in batches]


def roll_out_prompts(run: Run, update: int) -> tuple[Window, Window]:
    """This rank's rollout of a training step, and the one that RL looks at: the same, or one of its own.

    RL alone has no other rollout than its own. The prompts of both are asked for at once.
    """
    after, run = run.at(update + 1), run.at(update)
    indices, own = list_prompts(run, update)
    records = run.prompts.records([*indices, *own])
    items = run.prompts.items([*indices, *own])
    if update + 1 < run.training.updates:
        run.prepare([index for each in list_prompts(after, update + 1) for index in each])
    first, share = len(indices), run.share
    windows = []
    if indices:
        windows.append(roll_out_window(run, update, share.matching, items[:first], records[:first]))
    if own:
        windows.append(
            roll_out_window(run, update, share.own, items[first:], records[first:], group=run.batch_rl.group)
        )
    return windows[0], windows[-1]


def roll_out_window(
    run: Run, update: int, mine: Trajectories, items: list[Item], records: list[PromptRecord], *, group: int = 1
) -> Window:
    """N states of each trajectory of this rank. group: images of a prompt, which stay together, in RL's own rollout."""
    backbone, numbers, stage = run.base.backbone, mine.all, run.stage if group == 1 else name_own(run)
    c, shape = backbone.collate(items), (len(run.times) - 1, *backbone.latent_shape)
    parts = []
    for part in mine.split(run.rollout_batch or run.micro_batch, group):
        noises = run.noise.draw(run.seed, (stage, "rollout"), update, rows=numbers[part], shape=shape)
        noises_NB = send(noises, run.times).transpose(0, 1)
        c_part = {key: value[part] for key, value in c.items()}
        parts.append(roll_out(run.base, c_part, times=run.times, noises=noises_NB, eta=run.eta))
    x_t, x0 = (torch.cat(each, dim=1) for each in ([part.x_t for part in parts], [part.x0 for part in parts]))
    states = States(run.times[:-1], x_t, x0)
    return Window(
        states, c, records, run.times, run.eta, run.seed, stage, update, run.micro_batch, numbers, mine.of, run.noise
    )


def name_own(run: Run) -> str:
    """Names what is drawn for a rollout of RL's own."""
    return f"{run.stage} rl"


def list_prompts(run: Run, update: int) -> tuple[list[int], list[int]]:
    """The indices of the prompts of each trajectory that this rank rolls out, and of each that RL rolls out."""
    share, group, total = run.share, run.batch_rl.group, len(run.prompts)

    def find(number: int, of: int, stage: str, count: int = 1) -> list[int]:
        return prompt_order(run.seed, stage, update * of + number, count, total)

    matching, own = share.matching, share.own
    indices = find(matching.numbers.start, matching.of, run.stage, len(matching.numbers))
    indices += [index for number in matching.others for index in find(number, matching.of, run.stage)]
    of_groups = find(own.numbers.start // group, own.of // group, name_own(run), len(own.numbers) // group)
    return indices, [index for index in of_groups for _ in range(group)]


def count_window(run: Run) -> int:
    """The trajectories of a training step on all ranks, without those of RL's own."""
    return run.deal.trajectories


def select_batches(run: Run, window: Window) -> Batches:
    """K - 1 batches of B states for the fake score, then one of the student for each of its updates.

    Each trajectory gives its share to each batch, its steps in a random order, so that no batch is one prompt at all
    steps.
    """
    deal, steps, rows = run.deal, len(run.times) - 1, list[range]()
    mine = share_evenly(deal.states, distributed.ranks(), distributed.rank())
    turn = int(torch.randint(deal.batches, (), generator=window.generator("student batch")))

    def select(batch: int, name: str) -> list[Batch]:
        rows.append(deal.list_rows(mine, batch))
        pairs = window.find_pairs(deal, deal.list_states(rows[-1], batch), name, steps=steps)
        return select_states(window.states, window.c, pairs, most=run.micro_batch, of=run.training.batch_size)

    return Batches(
        fake_score=[select(batch, "fake pairs") for batch in range(run.training.fake_updates - 1)],
        student=[select((turn + inner) % deal.batches, "student pairs") for inner in range(run.batch_rl.inner_updates)],
        rows=rows,
    )
