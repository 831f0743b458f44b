"""Every compared model draws the same prompts from the same noise; images are kept shard by shard.

1. Noise is a function of (seed, prompt, step), so that students of 1, 2 and 4 steps and one seed start alike.
2. With `evaluate.seeds` a prompt has several images, each from its own noise, and a figure of the prompt is their mean.
   The first image is the one that a single seed draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.errors import Stopped
from dmdr.metrics.scorecard import Model
from dmdr.noise import generator_for, noise_for
from stages.evaluation.batch import Batch, Sampler
from stages.evaluation.evaluation_set import Attempt, images_file
from stages.evaluation.samples import Sample, build_sample, pack
from stages.evaluation.timing import DrawingTime, Stopwatch


@torch.no_grad()
def draw_model(attempt: Attempt, model: Model, load_sampler: Callable[[], Sampler], *, backbone: Backbone) -> None:
    """Draw this rank's shards of one model, except those that an earlier attempt drew.

    load_sampler: loads the model; not called when nothing is left to draw.

    Raises:
        Stopped: SIGTERM arrived. The shard in progress is lost, finished ones are kept.
    """
    own = attempt.evaluation_set.own_shards()
    missing = {
        number: places for number, places in own.items() if attempt.shards.get(images_file(model.name, number)) is None
    }
    work = attempt.work[model.name]
    attempt.tick(work * (sum(map(len, own.values())) - sum(map(len, missing.values()))))
    if not missing:
        return
    stopwatch, sampler = Stopwatch(), load_sampler()

    def draw(batch: range) -> torch.Tensor:
        return _draw_batch(attempt, batch, sampler, stopwatch, backbone=backbone)

    for number, places in missing.items():
        began = time.monotonic()
        samples = _draw_shard(attempt, places, draw, work=work)
        seconds = round(time.monotonic() - began, 3)
        if number == max(missing):
            firsts = [next(attempt.evaluation_set.split_batches(each, attempt.batch_size)) for each in missing.values()]
            stopwatch.repeat(partial(draw, max(firsts, key=len)))  # a shard's first batch is its largest
        images = len(places) * attempt.evaluation_set.seeds
        took = DrawingTime(seconds=seconds, images=images, batches=stopwatch.take())
        attempt.shards.keep(images_file(model.name, number), pack(samples), took.model_dump())


def _draw_shard(attempt: Attempt, places: range, draw: Callable[[range], torch.Tensor], *, work: int) -> list[Sample]:
    """draw: images (P, S, 3, H, W) of the prompts at some places."""
    samples: list[Sample] = []
    for batch in attempt.evaluation_set.split_batches(places, attempt.batch_size):
        if attempt.context.stop():
            raise Stopped("stopped; the images of finished shards are kept, repeat the command to go on")
        for place, images in zip(batch, draw(batch), strict=True):
            samples.append(build_sample(place, attempt.evaluation_set.records[place], images))
        attempt.tick(work * len(batch))
    return samples


def _draw_batch(
    attempt: Attempt, places: range, sampler: Sampler, stopwatch: Stopwatch, *, backbone: Backbone
) -> torch.Tensor:
    """(P, S, 3, H, W) in [0, 1], on the CPU."""
    evaluation_set, config = attempt.evaluation_set, attempt.context.config
    indices, seeds = [evaluation_set.indices[place] for place in places], evaluation_set.seeds
    noises = sample_noises(config.seed, indices, steps=config.student.steps, shape=backbone.latent_shape, seeds=seeds)
    batch = Batch(
        [evaluation_set.records[place]["prompt"] for place in places for _ in range(seeds)],
        backbone.collate([item for item in evaluation_set.prompts.items(indices) for _ in range(seeds)]),
        noises.to(backbone.network.device),
        [generator_for(config.seed, "evaluate", index, "own", n) for index in indices for n in range(seeds)],
    )
    return stopwatch.draw(sampler, batch).unflatten(0, (len(places), seeds))


def sample_noises(
    seed: int, indices: list[int], *, steps: int, shape: tuple[int, int, int], seeds: int = 1
) -> torch.Tensor:
    """(steps, B seeds, C, H, W): each image's own noise, the start first; a prompt's images stand together."""
    images = [(index, number) for index in indices for number in range(seeds)]

    def sample(index: int, step: int, number: int) -> torch.Tensor:
        own = (number,) if number else ()  # the first image is the one of a single seed
        return noise_for(seed, "evaluate", index, step, *own, shape=shape)

    return torch.stack(
        [torch.stack([sample(index, step, number) for index, number in images]) for step in range(steps)]
    )
