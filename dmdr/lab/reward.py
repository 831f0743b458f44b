"""Build the lab's rewards: contrastive learning on degraded images, against captions that are wrong in one thing.

1. Each image is compared with its own caption, with five hard negatives (one colour, shape, count or relation changed,
   or two colours swapped) and with the captions of the other images in the batch. The world of garments has its own
   hard negatives.
2. lab-conv, the reward that RL maximises in the world of shapes, also trains on adversarial images, to improve its
   gradient.
3. Logistic regression on right and wrong captions turns the cosine into a probability. (SigLIP, Zhai et al. 2023,
   learns the two numbers during training.) RL on the plain cosine keeps increasing it on images that are right
   already. A probability is flat there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.optimize import minimize

from dmdr.config.prompt_record import Metadata, PromptRecord
from dmdr.lab.fitting import Log
from dmdr.lab.prompts import TEMPLATES, find_held_out_pairs, lab_prompts
from dmdr.lab.renders import sample_renders
from dmdr.lab.vocabulary import COLORS, COUNTS, RELATIONS, SHAPES, caption
from dmdr.rewards.lab import LabReward

NEGATIVES, ATTACKS = 5, 2


class RewardRecipe(TypedDict):
    """The recipe of a reward. renders: number of training images. radius: of the attacks (L2 norm); 0 means none."""

    seed: int
    renders: int
    steps: int
    batch: int
    lr: float
    radius: float


RECIPES: dict[str, RewardRecipe] = {
    "lab-conv": {"seed": 10, "renders": 65536, "steps": 4000, "batch": 64, "lr": 2e-3, "radius": 0.3},
    "lab-mixer": {"seed": 20, "renders": 65536, "steps": 10000, "batch": 64, "lr": 2e-3, "radius": 0.0},
}


class World(NamedTuple):
    """The world that a reward learns.

    prompts: "train" or "held-out" -> the records of that list. sample: (list, count, rng) -> random records of a list
    and an image of each, (count, 3, 32, 32) uint8. write_wrong_caption: (record, rng) -> a caption that is wrong for
    every image of the record.
    """

    prompts: Callable[[str], tuple[PromptRecord, ...]]
    sample: Callable[[str, int, np.random.Generator], tuple[list[PromptRecord], torch.Tensor]]
    write_wrong_caption: Callable[[PromptRecord, np.random.Generator], str]


def degrade_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change noise, blur and contrast of images (B, 3, H, W) in [0, 1] by random amounts."""
    count = len(images)

    def draw_strength() -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, draw_strength() * (draw_strength() < 0.5))
    images = (images - 0.5) * (0.8 + 0.4 * draw_strength()) + 0.5
    return images + torch.randn(images.shape, generator=generator) * 0.2 * draw_strength() ** 2


def write_wrong_caption(metadata: Metadata, rng: np.random.Generator) -> str:
    """A caption that is wrong in one thing for every render of `metadata`.

    It names no held-out pair that `metadata` does not name. A reward that saw these pairs only in wrong captions would
    learn that they are wrong.
    """
    while True:
        wrong = alter_metadata(metadata, rng)
        if not find_held_out_pairs(wrong) - find_held_out_pairs(metadata):
            return str(rng.choice(TEMPLATES)).format(caption(wrong))


def alter_metadata(metadata: Metadata, rng: np.random.Generator) -> Metadata:
    """Change one thing in the metadata, so that the result is wrong for every render of the original."""
    needs = copy.deepcopy(metadata["include"])
    need = needs[rng.integers(len(needs))]
    classes = {each["class"] for each in needs}
    changes = ["class"]  # a change that is listed n times is n times as likely
    changes += ["color"] * 2 if "color" in need else []
    changes += ["count"] * 2 if metadata["tag"] == "counting" else []
    changes += ["relation"] * 3 if metadata["tag"] == "position" else []
    changes += ["swap"] * 2 if len({each.get("color") for each in needs}) == 2 else []
    change = rng.choice(changes)
    if change == "class":
        need["class"] = str(rng.choice([shape for shape in SHAPES if shape not in classes]))
    elif change == "color":
        used = {each.get("color") for each in needs}
        need["color"] = str(rng.choice([color for color in COLORS if color not in used]))
    elif change == "count":
        need["count"] = int(rng.choice([count for count in COUNTS if count != need["count"]]))
    elif change == "relation":
        relation = needs[1]["position"][0]
        needs[1]["position"] = (str(rng.choice([each for each in RELATIONS if each != relation])), 0)
    else:
        needs[0]["color"], needs[1]["color"] = needs[1]["color"], needs[0]["color"]
    return {"tag": metadata["tag"], "include": needs}


def build_reward(name: str, folder: Path, log: Log) -> None:
    """Build the reward `name`, one of RECIPES, and save it in `folder`."""
    fit_reward(name, RECIPES[name], World(lab_prompts, sample_renders, write_wrong_caption), folder, log)


def fit_reward(name: str, recipe: RewardRecipe, world: World, folder: Path, log: Log) -> None:
    """Train by the recipe and save NAME.safetensors (float16) and NAME.json (vocabulary, recipe, scores)."""
    rng, generator = np.random.default_rng(recipe["seed"]), torch.Generator().manual_seed(recipe["seed"])
    torch.manual_seed(recipe["seed"])
    vocabulary = sorted({word for record in world.prompts("train") for word in record["prompt"].split()})
    reward = LabReward(name, vocabulary)
    records, images = world.sample("train", recipe["renders"], rng)
    optimizer = torch.optim.AdamW(reward.parameters(), lr=recipe["lr"], weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], recipe["steps"], pct_start=0.05)
    for step in range(recipe["steps"]):
        indices = rng.integers(len(records), size=recipe["batch"])
        batch = degrade_images(images[indices].float() / 255, generator)
        own = reward.embed_captions([records[i]["prompt"] for i in indices])
        wrong_captions = [world.write_wrong_caption(records[i], rng) for i in indices for _ in range(NEGATIVES)]
        wrong = reward.embed_captions(wrong_captions)
        captions = torch.cat([own[:, None], wrong.view(len(own), NEGATIVES, -1)], dim=1)
        batch = attack(reward, batch, captions.detach(), recipe["radius"])
        loss = contrastive_loss(reward, batch, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            log(f"{name} {step}/{recipe['steps']} loss {loss.item():.3f}")
    scale, bias = calibrate(reward.eval(), world)
    accuracy = measure_accuracy(reward, world)
    report = {"recipe": recipe, "held_out_accuracy": accuracy, "scale": scale, "bias": bias, "vocabulary": vocabulary}
    log(f"{name}: the right caption scores above {NEGATIVES} wrong ones for {accuracy:.3f} of the held-out prompts")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in reward.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def contrastive_loss(reward: LabReward, images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Compare each image with its own caption, its wrong captions and the right captions of the other images.

    captions: embeddings (B, 1 + NEGATIVES, D), of each image the right caption first.
    """
    image, temperature = reward.embed_images(images), reward.log_temperature.exp()
    logits_right = image @ captions[:, 0].T * temperature  # (B, B): each image with all right captions
    logits_wrong = torch.einsum("bd,bnd->bn", image, captions[:, 1:]) * temperature
    labels = torch.arange(len(image))
    loss_images = F.cross_entropy(torch.cat([logits_right, logits_wrong], dim=1), labels)
    return loss_images + 0.5 * F.cross_entropy(logits_right.T, labels)


def attack(reward: LabReward, images: torch.Tensor, captions: torch.Tensor, radius: float) -> torch.Tensor:
    """Images (B, 3, H, W) within `radius` (L2) of the given ones, moved by ATTACKS steps that increase the loss.

    These are adversarial examples (Madry et al. 2018). The gradients of a classifier that resists them draw things
    instead of noise (Santurkar et al. 2019), and ReFL follows only the gradient. We do not know whether it helps here:
    runs with and without attacks did not differ measurably.
    """
    offset = torch.zeros_like(images)
    for _ in range(ATTACKS if radius else 0):
        offset.requires_grad_()
        (ascent,) = torch.autograd.grad(contrastive_loss(reward, images + offset, captions), offset)
        step = ascent / (ascent.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12) * radius * 1.25 / ATTACKS
        offset = (offset + step).detach()
        offset = offset * (radius / offset.flatten(1).norm(dim=1).clamp(min=radius)).view(-1, 1, 1, 1)
    return images + offset


@torch.no_grad()
def calibrate(reward: LabReward, world: World) -> tuple[float, float]:
    """Fit (scale, bias) so that sigmoid(scale cosine + bias) is the probability that a caption is right.

    The data are clean images of training prompts, each with a right and a wrong caption.
    """
    rng = np.random.default_rng(98)
    records, images = world.sample("train", 3000, rng)
    captions = [[r["prompt"] for r in records], [world.write_wrong_caption(r, rng) for r in records]]
    image = reward.embed_images(images.float() / 255)
    right, wrong = ((image * reward.embed_captions(each)).sum(1).double().numpy() for each in captions)

    def negative_log_likelihood(x: np.ndarray) -> float:
        return np.logaddexp(0, -(x[0] * right + x[1])).mean() + np.logaddexp(0, x[0] * wrong + x[1]).mean()

    scale, bias = minimize(negative_log_likelihood, np.array([10.0, -5.0]), method="BFGS").x
    return float(scale), float(bias)


@torch.no_grad()
def measure_accuracy(reward: LabReward, world: World) -> float:
    """The share of clean images of held-out prompts for which the right caption scores above NEGATIVES wrong ones."""
    rng = np.random.default_rng(99)
    records, images = world.sample("held-out", 1200, rng)
    right = reward(images.float() / 255, [record["prompt"] for record in records])
    best = torch.full_like(right, -1.0)
    for _ in range(NEGATIVES):
        wrong = reward(images.float() / 255, [world.write_wrong_caption(record, rng) for record in records])
        best = torch.maximum(best, wrong)
    return float((right > best).float().mean())
