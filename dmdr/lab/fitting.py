"""What every lab teacher is trained by: a learning-rate schedule, and denoising on encoded images.

Text and latents are encoded once: a step costs the network alone. Prompts are dropped one time in ten, for CFG.
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
    """How long a network learns and at which learning rates; as part of a recipe, it is written as JSON.

    stop: the step after which training ends; without it, after all `steps`. warmup: in steps.
    """

    steps: int
    stop: NotRequired[int]
    batch: int
    lr: float
    warmup: int


class NetworkRecipe(Schedule):
    """How a teacher's network is trained. ema: decay of the moving average. drop_prompt: how often CFG's empty prompt
    replaces the prompt. dtype: "bfloat16" for autocast; without it, float32."""

    betas: list[float]
    weight_decay: float
    clip: float
    ema: float
    drop_prompt: float
    dtype: NotRequired[str]


def iterate_schedule(recipe: Schedule, count: int) -> Iterator[tuple[int, float, torch.Tensor]]:
    """(step, learning rate, indices (batch,) into `count` images): a linear warm-up, then a cosine down to 0.

    `stop` ends it early: a teacher is imperfect on purpose, so that its student has something to gain.
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
    levels: Callable[[int], torch.Tensor],
) -> None:
    """Train the backbone's network in place; afterwards it holds its exponential moving average.

    prompts, x0_all (R, C, H, W): the images and what they show. levels: B -> noise levels t (B,).
    """
    captions = ["", *sorted(set(prompts))]
    items = [item for start in range(0, len(captions), 64) for item in backbone.encode(captions[start : start + 64])[0]]
    number = {prompt: index for index, prompt in enumerate(captions)}
    prompt_of = torch.tensor([number[prompt] for prompt in prompts])

    network, path = backbone.network.requires_grad_(True).train(), backbone.path
    first, second = recipe["betas"]
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=(first, second), weight_decay=recipe["weight_decay"], fused=True
    )
    ema = EMAModel(network.parameters(), decay=recipe["ema"], foreach=True)
    started = time.monotonic()
    for step, rate, chosen in iterate_schedule(recipe, len(prompts)):
        optimizer.param_groups[0]["lr"] = rate
        kept = torch.rand(len(chosen)) >= recipe["drop_prompt"]
        c = backbone.collate([items[index] for index in prompt_of[chosen] * kept])
        t, x0 = levels(len(chosen)), x0_all[chosen]
        noise = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.get("dtype") == "bfloat16"):
            prediction = backbone.predict(network, path.renoise(x0, noise, t), t, c)
        loss = F.mse_loss(prediction.float(), path.target(x0, noise))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe["clip"])
        optimizer.step()
        ema.step(network.parameters())
        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1)
            log(f"network {step}/{recipe['steps']} loss {loss.item():.4f} {pace:.2f} s/step")
    ema.copy_to(network.parameters())
    network.requires_grad_(False).eval()
