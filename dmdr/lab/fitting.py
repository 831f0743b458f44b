"""Train the network of a lab teacher: a learning-rate schedule, and denoising on encoded images.

Prompts and images are encoded once, so that a step runs only the network. One prompt in ten is dropped, for CFG.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel

from dmdr.backbones.protocol import Backbone

Log = Callable[[str], None]


class Schedule(TypedDict):
    """The number of steps, the batch size and the learning rate; a part of a recipe, which is saved as JSON.

    lr: the highest learning rate. stop: the number of steps after which training ends, if not after all `steps`.
    warmup: in steps.
    """

    steps: int
    stop: NotRequired[int]
    batch: int
    lr: float
    warmup: int


class NetworkRecipe(Schedule):
    """The recipe of a teacher's network.

    clip: largest gradient norm. ema: decay of the moving average. drop_prompt: probability that CFG's empty prompt
    replaces the prompt. dtype: "bfloat16" for autocast; without it, float32.
    """

    betas: list[float]
    weight_decay: float
    clip: float
    ema: float
    drop_prompt: float
    dtype: NotRequired[str]


def iterate_schedule(recipe: Schedule, count: int) -> Iterator[tuple[int, float, torch.Tensor]]:
    """For each step: (step, learning rate, indices (batch,) into `count` images).

    The learning rate warms up linearly and follows a cosine down to 0. `stop` ends it early: a teacher is imperfect on
    purpose, so that its student has something to gain.
    """
    for step in range(recipe.get("stop", recipe["steps"])):
        factor = min((step + 1) / recipe["warmup"], 0.5 * (1 + math.cos(math.pi * step / recipe["steps"])))
        yield step, recipe["lr"] * factor, torch.randint(count, (recipe["batch"],))


def fit_network(
    backbone: Backbone,
    prompts: list[str],
    x0_all: torch.Tensor,
    recipe: NetworkRecipe,
    log: Log,
    *,
    sample_levels: Callable[[int], torch.Tensor],
) -> None:
    """Train the backbone's network in place. At the end it holds the exponential moving average of its weights.

    prompts, x0_all (R, C, H, W): the captions and latents of the images. sample_levels: B -> noise levels t (B,).
    """
    captions = ["", *sorted(set(prompts))]
    items = [item for start in range(0, len(captions), 64) for item in backbone.encode(captions[start : start + 64])[0]]
    item_index = {caption: index for index, caption in enumerate(captions)}
    item_of = torch.tensor([item_index[prompt] for prompt in prompts])  # for each image; 0 is the empty prompt

    network, path = backbone.network.requires_grad_(True).train(), backbone.path
    beta1, beta2 = recipe["betas"]
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=(beta1, beta2), weight_decay=recipe["weight_decay"], fused=True
    )
    ema = EMAModel(network.parameters(), decay=recipe["ema"], foreach=True)
    started = time.monotonic()
    for step, rate, indices in iterate_schedule(recipe, len(prompts)):
        optimizer.param_groups[0]["lr"] = rate
        kept = torch.rand(len(indices)) >= recipe["drop_prompt"]
        c = backbone.collate([items[index] for index in item_of[indices] * kept])
        t, x0 = sample_levels(len(indices)), x0_all[indices]
        noise = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.get("dtype") == "bfloat16"):
            prediction = backbone.predict(network, path.renoise(x0, noise, t), t, c)
        loss = F.mse_loss(prediction.float(), path.target(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe["clip"])
        optimizer.step()
        ema.step(network.parameters())
        if step % 100 == 0:
            seconds = (time.monotonic() - started) / (step + 1)
            log(f"network {step}/{recipe['steps']} loss {loss.item():.4f} {seconds:.2f} s/step")
    ema.copy_to(network.parameters())
    network.requires_grad_(False).eval()
