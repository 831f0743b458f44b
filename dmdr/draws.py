"""What a training step trains on: the prompts of this rank, their rollout, batches of its states, levels and noise.

1. What is drawn depends on (seed, stage, update) and the number of a sample alone, never on history or on the ranks,
   each of which draws for its own samples.
2. What distribution matching and the fake score see is the same whatever the RL: DPO and GRPO compare whole
   trajectories of a rollout of their own, or branches of the states that are there.
"""

from __future__ import annotations

from collections.abc import Callable
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
from dmdr.dyna import renoise_beta, renoise_levels
from dmdr.noise import RowNoise, generator_for, uniforms_for
from dmdr.promptset.prompts import Prompts
from dmdr.rl.objective import RLTerm
from dmdr.rollout import States, Window, prompt_order
from dmdr.shared_base import SharedBase
from dmdr.transfer import send
from dmdr.update import Batch, GuidanceLevels, Levels, roll_out, select_states
from dmdr.watch.watcher import Watcher


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
