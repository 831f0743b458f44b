"""Captioned garments: real ones, tinted as a prompt asks. Held-out prompts show garments that no training ever sees."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.lab.fashion.garments import read_garments
from dmdr.lab.fashion.prompts import fashion_prompts
from dmdr.lab.fashion.world import CLASSES, tint

GARMENTS = {"train": "train", "held-out": "test"}  # Fashion-MNIST's split for each list of prompts


def sample_garments(split: str, count: int, rng: np.random.Generator) -> tuple[list[PromptRecord], torch.Tensor]:
    """Records drawn from a list of prompts, and an image of what each asks for, (count, 3, 32, 32) uint8.

    Raises:
        InputMissing: Fashion-MNIST is not installed.
    """
    images, labels = read_garments(GARMENTS[split])
    places = [np.flatnonzero(labels == label) for label in range(len(CLASSES))]
    known = fashion_prompts(split)
    records = [known[index] for index in rng.integers(len(known), size=count)]
    needs = [record["include"][0] for record in records]
    chosen = [rng.choice(places[CLASSES.index(need["class"])]) for need in needs]
    tinted = tint(images[chosen], [need["color"] for need in needs])
    return records, torch.from_numpy(tinted).permute(0, 3, 1, 2).contiguous()
