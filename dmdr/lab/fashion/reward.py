"""Build the rewards of the world of garments: as `dmdr.lab.reward`, on garments of the train split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmdr.config.prompt_record import Metadata, Need
from dmdr.lab.fashion.prompts import HELD_OUT_PAIRS, fashion_prompts
from dmdr.lab.fashion.vocabulary import CLASSES, caption
from dmdr.lab.fashion.wardrobe import sample_garments
from dmdr.lab.fitting import Log
from dmdr.lab.prompts import TEMPLATES
from dmdr.lab.reward import RewardRecipe, World, fit_reward
from dmdr.lab.vocabulary import COLORS

RECIPES: dict[str, RewardRecipe] = {
    "fashion-conv": {"seed": 30, "renders": 65536, "steps": 2000, "batch": 64, "lr": 2e-3, "radius": 0.0},
    "fashion-mixer": {"seed": 40, "renders": 65536, "steps": 2000, "batch": 64, "lr": 2e-3, "radius": 0.0},
}


def write_wrong_caption(metadata: Metadata, rng: np.random.Generator) -> str:
    """A caption with another colour or another class, each half of the time. It never names a held-out pair."""
    (need,) = metadata["include"]
    others: list[Need]
    if rng.integers(2) == 0:
        others = [{**need, "color": color} for color in COLORS if color != need["color"]]
    else:
        others = [{**need, "class": name} for name in CLASSES if name != need["class"]]
    allowed = [each for each in others if (each["color"], each["class"]) not in HELD_OUT_PAIRS]
    wrong = allowed[rng.integers(len(allowed))]
    return str(rng.choice(TEMPLATES)).format(caption({"include": [wrong]}))


def build_fashion_reward(name: str, folder: Path, log: Log) -> None:
    """Build the reward `name`, one of RECIPES, and save it in `folder`.

    Raises:
        InputMissing: Fashion-MNIST is not installed.
    """
    fit_reward(name, RECIPES[name], World(fashion_prompts, sample_garments, write_wrong_caption), folder, log)
