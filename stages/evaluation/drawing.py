"""Every compared model draws the same prompts from the same noise; images are kept shard by shard.

1. Noise is a function of (seed, prompt, step), so that students of 1, 2 and 4 steps and one seed start alike.
2. With `evaluate.seeds` a prompt has several images, each from its own noise, and a figure of the prompt is their mean.
   The first image is the one that a single seed draws.
3. A shard does not depend on the number of processes, nor its batches: whoever draws it draws the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Backbone
from dmdr.errors import Stopped
from dmdr.metrics.scorecard import Model
from dmdr.promptset import PromptRecord, PromptSet
from dmdr.rollout import generator_for, noise_for
from stages.evaluation.batch import Batch, Sampler
from stages.evaluation.samples import build_sample, pack
from stages.runtime.context import Context
from stages.store.shards import Shards

SHARD = 128  # images: what a killed attempt loses at most

Tick = Callable[[int], None]  # told how many more prompts are done


@dataclass(frozen=True)
class EvaluationSet:
    """What every model draws. indices: of prompts in the PromptSet; records: theirs, in the same order."""

    prompts: PromptSet
    indices: list[int]
    records: list[PromptRecord]
    seeds: int

    def shards(self) -> list[range]:
        """Places of the prompts of each shard."""
        size = max(1, SHARD // self.seeds)
        return [range(first, min(first + size, len(self.indices))) for first in range(0, len(self.indices), size)]

    def mine(self) -> list[tuple[int, range]]:
        """(number, places) of the shards that are this rank's."""
        return list(enumerate(self.shards()))[distributed.rank() :: distributed.ranks()]


def images_part(model: str, shard: int) -> str:
    return f"samples/{model_folder(model)}-{shard:05d}.tar"


def model_folder(model: str) -> str:
    return model.replace(" ", "-")


@torch.no_grad()
def draw_model(
    context: Context,
    exam: EvaluationSet,
    parts: Shards,
    model: Model,
    sampler: Callable[[], Sampler],
    tick: Tick,
    *,
    backbone: Backbone,
) -> None:
    """Draw this rank's shards of one model, but for those that an earlier attempt drew.

    sampler: makes the model's; not called when nothing is left to draw.

    Raises:
        Stopped: asked to; what of a shard was drawn is lost, whole shards are not.
    """
    todo = [(n, places) for n, places in exam.mine() if parts.get(images_part(model.name, n)) is None]
    tick(sum(len(places) for _, places in exam.mine()) - sum(len(places) for _, places in todo))
    if not todo:
        return
    draws = sampler()
    at_once = max(1, context.config.evaluate.batch_size // exam.seeds)  # prompts: a batch holds all images of each
    for number, places in todo:
        began, drawn = time.monotonic(), []
        for first in range(places.start, places.stop, at_once):
            if context.stop():
                raise Stopped("stopped; whole shards of images are kept, repeat the command to go on")
            batch = places[first - places.start : first - places.start + at_once]
            images = _draw_batch(context, exam, batch, draws, backbone)
            drawn += [build_sample(p, exam.records[p], each) for p, each in zip(batch, images, strict=True)]
            tick(len(batch))
        seconds = time.monotonic() - began
        about = {"seconds": round(seconds, 3), "images": len(places) * exam.seeds}
        parts.keep(images_part(model.name, number), pack(drawn), about)


def _draw_batch(
    context: Context, exam: EvaluationSet, places: range, draws: Sampler, backbone: Backbone
) -> torch.Tensor:
    """(P, S, 3, H, W) in [0, 1], on the CPU."""
    indices, seed = [exam.indices[place] for place in places], context.config.seed
    steps, shape = context.config.student.steps, backbone.latent_shape
    noises = sample_noises(seed, indices, steps=steps, shape=shape, seeds=exam.seeds)
    records = [exam.records[place] for place in places for _ in range(exam.seeds)]
    batch = Batch(
        [record["prompt"] for record in records],
        backbone.collate([item for item in exam.prompts.items(indices) for _ in range(exam.seeds)]),
        noises.to(backbone.network.device),
        [generator_for(seed, "evaluate", index, "own", number) for index in indices for number in range(exam.seeds)],
    )
    return draws(batch).float().cpu().unflatten(0, (len(places), exam.seeds))


def sample_noises(
    seed: int, indices: list[int], *, steps: int, shape: tuple[int, int, int], seeds: int = 1
) -> torch.Tensor:
    """(steps, B seeds, C, H, W): each image's own noise, the start first; a prompt's images stand together."""
    draws = [(index, number) for index in indices for number in range(seeds)]

    def noise(index: int, step: int, number: int) -> torch.Tensor:
        own = (number,) if number else ()  # the first image is the one of a single seed
        return noise_for(seed, "evaluate", index, step, *own, shape=shape)

    return torch.stack([torch.stack([noise(index, step, number) for index, number in draws]) for step in range(steps)])
