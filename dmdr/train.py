"""The loop of both training stages: K - 1 updates of the fake score, then one of the student with the K-th.

1. Joint training starts from the EMA of the cold start, the weights that were measured, and from its fake score.
2. What an update draws (prompts, noise, levels, pairs) depends on (seed, stage, update) alone, never on history.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dmdr.backbones import Conditioning
from dmdr.backbones.scores import SharedBase
from dmdr.config import Training
from dmdr.dyna import real_scale, renoise_beta, renoise_levels
from dmdr.errors import NonFinite
from dmdr.promptset import PromptSet
from dmdr.rl.refl import ReFL
from dmdr.rollout import generator_for, noise_for
from dmdr.state import TrainState
from dmdr.update import Batch, Renoise, rollout, select, trajectories, update_fake_score, update_student


@dataclass(frozen=True)
class Run:
    """What stays the same through a training stage. `rl_weight` is ignored without `rl`."""

    stage: str
    seed: int
    training: Training
    base: SharedBase
    prompts: PromptSet
    unconditional: Conditioning
    times: torch.Tensor
    guidance_scale: float
    rl: ReFL | None = None
    rl_weight: float = 0.0


def train(
    run: Run,
    state: TrainState,
    *,
    checkpoint: Callable[[bool], None],
    report: Callable[[dict[str, float]], None],
    stop: Callable[[], bool],
) -> bool:
    """Train until `training.updates` are done; True when they are, False when `stop` asked to leave after an update.

    `checkpoint(now)` is called after each update; now is True on leaving early.

    Raises:
        NonFinite: a loss or gradient is not a number; the newest checkpoint is from before it.
    """
    while state.update < run.training.updates:
        if stop():
            checkpoint(True)
            return False
        started = time.monotonic()
        row = window(run, state)
        for name, value in row.items():
            if not math.isfinite(value):
                raise NonFinite(
                    f"{run.stage}: {name} is {value} at update {state.update}; the last checkpoint is whole: "
                    "lower the learning rates (fake_score first) or the RL weight"
                )
        row = {"update": state.update, **row}
        state.advance(row)
        report({**row, "seconds": time.monotonic() - started})
        checkpoint(False)
    return True


def window(run: Run, state: TrainState) -> dict[str, float]:
    """One window of `dmdr.update`; returns its figures."""
    training, update = run.training, state.update
    batches, texts = batches_of(run, update)
    beta = renoise_beta(update, training.dynamic)

    def renoise(part: int, batch: Batch) -> Renoise:
        generator = generator_for(run.seed, run.stage, "levels", update, part)
        t = renoise_levels(beta, training.renoise_range, len(batch.t), generator)
        noise = noise_for(run.seed, run.stage, "renoise", update, part, shape=tuple(batch.x0.shape))
        return Renoise(t.to(batch.x0), noise.to(batch.x0))

    for part in range(training.fake_updates - 1):
        batch = next(batches)
        clip = training.fake_score.clip
        update_fake_score(run.base, batch, renoise(part, batch), state.optimizers["fake_score"], clip=clip)

    batch = next(batches)
    levels = renoise(training.fake_updates - 1, batch)
    scale = real_scale(update, training.dynamic)
    rl = run.rl and (lambda x0, prompt: run.rl(x0, [texts[i] for i in prompt.tolist()]), run.rl_weight)
    figures = update_student(
        run.base, batch, run.unconditional, levels, (state.optimizers["student"], state.optimizers["fake_score"]),
        guidance_scale=run.guidance_scale, real_scale=scale, rl=rl,
        clips=(training.student.clip, training.fake_score.clip),
    )  # fmt: skip
    figures = {name: float(value) for name, value in figures.items()}
    return {**figures, "real_scale": scale, "renoise_mean": float(levels.t.mean())}


def batches_of(run: Run, update: int) -> tuple[Iterator[Batch], list[str]]:
    """Roll out one window: K batches of B states each, the last for the student; and the text of each prompt."""
    training, steps = run.training, len(run.times) - 1
    batch_size, fake_updates = training.batch_size, training.fake_updates
    count = trajectories(batch_size, fake_updates, steps)
    indices = prompt_order(run.seed, run.stage, update * count, count, len(run.prompts))
    backbone = run.base.backbone
    c = backbone.collate(run.prompts.items(indices))
    shape = (steps, count, *backbone.latent_shape)
    noises = noise_for(run.seed, run.stage, "rollout", update, shape=shape).to(run.times)
    states = rollout(run.base, c, run.times, noises)

    def shuffled(name: str) -> torch.Tensor:  # pairs (trajectory, step), so that no batch is one prompt at N steps
        return torch.randperm(steps * count, generator=generator_for(run.seed, run.stage, name, update))

    fake_pairs = shuffled("fake pairs").split(batch_size)[: fake_updates - 1]
    pairs = [*fake_pairs, shuffled("student pairs")[:batch_size]]
    texts = [record["prompt"] for record in run.prompts.records(indices)]
    return (select(states, c, each.to(run.times.device)) for each in pairs), texts


def prompt_order(seed: int, stage: str, start: int, count: int, total: int) -> list[int]:
    """Positions start .. start + count of an endless shuffled reading of `total` prompts, each once an epoch."""
    order = []
    for position in range(start, start + count):
        epoch, index = divmod(position, total)
        if not order or index == 0:
            permutation = torch.randperm(total, generator=generator_for(seed, stage, "order", epoch))
        order.append(int(permutation[index]))
    return order
