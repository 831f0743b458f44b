"""How the lab's rewards were built: contrastive learning on spoilt images, against captions wrong in one thing.

Each image is scored against its own caption, five hard negatives (one colour, shape, count or relation changed, or
two colours swapped) and the captions of the other images in the batch. The second world has its own hard negatives.
What RL climbs in the world of shapes, lab-conv, is trained against attacks besides, for the sake of its gradient.
Then the cosine becomes a probability: logistic regression on right captions against wrong ones (SigLIP, Zhai et al.
2023, learns the two numbers along the way). RL on the bare cosine climbs where nothing is to be gained, on images that
are right already; a probability is level there.
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
from dmdr.lab.prompts import TEMPLATES, lab_prompts, unseen_pairs
from dmdr.lab.renders import sample_renders
from dmdr.lab.world import COLORS, COUNTS, RELATIONS, SHAPES, caption
from dmdr.rewards.lab import LabReward

NEGATIVES, ATTACKS = 5, 2


class RewardRecipe(TypedDict):
    """How a reward is trained. renders: how many images it learns from. radius: of the attacks (L2); 0 for none."""

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
    """What rewards learn from.

    prompts: "train" or "held-out" to its records. drawn: (list, count, rng) to records of a list and an image of each,
    (count, 3, 32, 32) uint8. wrong_caption: (record, rng) to a caption that is false of each of its images.
    """

    prompts: Callable[[str], tuple[PromptRecord, ...]]
    drawn: Callable[[str, int, np.random.Generator], tuple[list[PromptRecord], torch.Tensor]]
    wrong_caption: Callable[[PromptRecord, np.random.Generator], str]


def spoil(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, blur and contrast of random strength on images (B, 3, H, W) in [0, 1]."""
    count = len(images)

    def strength() -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, strength() * (strength() < 0.5))
    images = (images - 0.5) * (0.8 + 0.4 * strength()) + 0.5
    return images + torch.randn(images.shape, generator=generator) * 0.2 * strength() ** 2


def spoil_caption(metadata: Metadata, rng: np.random.Generator) -> str:
    """A caption that is false of every render of `metadata`, in one thing only.

    It brings in no held-out pair: a reward that meets those as wrong captions alone learns that they are wrong.
    """
    while unseen_pairs(wrong := alter_metadata(metadata, rng)) - unseen_pairs(metadata):
        pass
    return str(rng.choice(TEMPLATES)).format(caption(wrong))


def alter_metadata(metadata: Metadata, rng: np.random.Generator) -> Metadata:
    """Metadata that differs in one thing, and is false of every render of what is given."""
    needs = copy.deepcopy(metadata["include"])
    need = needs[rng.integers(len(needs))]
    classes = {each["class"] for each in needs}
    ways = ["class"]
    ways += ["color"] * 2 if "color" in need else []
    ways += ["count"] * 2 if metadata["tag"] == "counting" else []
    ways += ["relation"] * 3 if metadata["tag"] == "position" else []
    ways += ["swap"] * 2 if len({each.get("color") for each in needs}) == 2 else []
    way = rng.choice(ways)
    if way == "class":
        need["class"] = str(rng.choice([shape for shape in SHAPES if shape not in classes]))
    elif way == "color":
        used = {each.get("color") for each in needs}
        need["color"] = str(rng.choice([color for color in COLORS if color not in used]))
    elif way == "count":
        need["count"] = int(rng.choice([count for count in COUNTS if count != need["count"]]))
    elif way == "relation":
        relation = needs[1]["position"][0]
        needs[1]["position"] = (str(rng.choice([each for each in RELATIONS if each != relation])), 0)
    else:
        needs[0]["color"], needs[1]["color"] = needs[1]["color"], needs[0]["color"]
    return {"tag": metadata["tag"], "include": needs}


def build_reward(name: str, folder: Path, log: Log) -> None:
    """A reward of the world of shapes, from its recipe."""
    fit_reward(name, RECIPES[name], World(lab_prompts, sample_renders, spoil_caption), folder, log)


def fit_reward(name: str, recipe: RewardRecipe, world: World, folder: Path, log: Log) -> None:
    """Train from the recipe; saves NAME.safetensors (float16) and NAME.json (vocabulary, recipe, scores)."""
    rng, generator = np.random.default_rng(recipe["seed"]), torch.Generator().manual_seed(recipe["seed"])
    torch.manual_seed(recipe["seed"])
    vocabulary = sorted({word for record in world.prompts("train") for word in record["prompt"].split()})
    reward = LabReward(name, vocabulary)
    records, images = world.drawn("train", recipe["renders"], rng)
    optimizer = torch.optim.AdamW(reward.parameters(), lr=recipe["lr"], weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], recipe["steps"], pct_start=0.05)
    for step in range(recipe["steps"]):
        chosen = rng.integers(len(records), size=recipe["batch"])
        batch = spoil(images[chosen].float() / 255, generator)
        own = reward.embed_captions([records[i]["prompt"] for i in chosen])
        wrong = reward.embed_captions([world.wrong_caption(records[i], rng) for i in chosen for _ in range(NEGATIVES)])
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
    right = measure_accuracy(reward, world)
    card = {"recipe": recipe, "held_out_accuracy": right, "scale": scale, "bias": bias, "vocabulary": vocabulary}
    log(f"{name}: right caption above its {NEGATIVES} wrong ones on held-out prompts: {card['held_out_accuracy']:.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in reward.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def contrastive_loss(reward: LabReward, images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Each image against its own caption, its wrong ones and the other images' own; captions (B, 1 + NEGATIVES, D)."""
    image, temperature = reward.embed_images(images), reward.log_temperature.exp()
    across = image @ captions[:, 0].T * temperature
    against = torch.einsum("bd,bnd->bn", image, captions[:, 1:]) * temperature
    labels = torch.arange(len(image))
    return F.cross_entropy(torch.cat([across, against], dim=1), labels) + 0.5 * F.cross_entropy(across.T, labels)


def attack(reward: LabReward, images: torch.Tensor, captions: torch.Tensor, radius: float) -> torch.Tensor:
    """The worst images (B, 3, H, W) that ATTACKS steps of ascent find within `radius` of each (L2; Madry et al. 2018).

    A classifier that these do not fool has gradients that draw things rather than noise (Santurkar et al. 2019), and
    ReFL follows nothing else. Whether it helps here is not settled: runs with and without were not told apart.
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
    """(scale, bias): sigmoid(scale cosine + bias) is the probability that a caption is right, on clean images of
    training prompts with a right and a wrong caption each."""
    rng = np.random.default_rng(98)
    records, images = world.drawn("train", 3000, rng)
    captions = [[r["prompt"] for r in records], [world.wrong_caption(r, rng) for r in records]]
    seen = reward.embed_images(images.float() / 255)
    right, wrong = ((seen * reward.embed_captions(each)).sum(1).double().numpy() for each in captions)

    def surprise(x: np.ndarray) -> float:
        return np.logaddexp(0, -(x[0] * right + x[1])).mean() + np.logaddexp(0, x[0] * wrong + x[1]).mean()

    scale, bias = minimize(surprise, np.array([10.0, -5.0]), method="BFGS").x
    return float(scale), float(bias)


@torch.no_grad()
def measure_accuracy(reward: LabReward, world: World) -> float:
    """How often, on clean images of held-out prompts, the right caption scores above five wrong ones."""
    rng = np.random.default_rng(99)
    records, images = world.drawn("held-out", 1200, rng)
    right = reward(images.float() / 255, [record["prompt"] for record in records])
    best = torch.full_like(right, -1.0)
    for _ in range(NEGATIVES):
        wrong = reward(images.float() / 255, [world.wrong_caption(record, rng) for record in records])
        best = torch.maximum(best, wrong)
    return float((right > best).float().mean())
