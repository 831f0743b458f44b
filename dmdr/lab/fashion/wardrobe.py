"""Garments with captions: real ones, tinted as a prompt asks. Those of held-out prompts are never trained on."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.lab.fashion.garments import read_garments
from dmdr.lab.fashion.prompts import fashion_prompts
from dmdr.lab.fashion.vocabulary import CLASSES
from dmdr.lab.fashion.world import tint

GARMENTS = {"train": "train", "held-out": "test"}  # list of prompts -> split of Fashion-MNIST


def sample_garments(split: str, count: int, rng: np.random.Generator) -> tuple[list[PromptRecord], torch.Tensor]:
    """Random records of a list of prompts, and an image of what each asks for: (count, 3, 32, 32) uint8.

    Raises:
        InputMissing: Fashion-MNIST is not installed.
    """
    images, labels = read_garments(GARMENTS[split])
    indices_of_class = [np.flatnonzero(labels == label) for label in range(len(CLASSES))]
    prompts = fashion_prompts(split)
    records = [prompts[index] for index in rng.integers(len(prompts), size=count)]
    needs = [record["include"][0] for record in records]
    indices = [rng.choice(indices_of_class[CLASSES.index(need["class"])]) for need in needs]
    tinted = tint(images[indices], [need["color"] for need in needs])
    return records, torch.from_numpy(tinted).permute(0, 3, 1, 2).contiguous()
