"""Renders with captions: random records of all GenEval tasks, each with an image of what it asks for."""

from __future__ import annotations

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.lab.prompts import lab_prompts
from dmdr.lab.world import render_images


def sample_renders(split: str, count: int, rng: np.random.Generator) -> tuple[list[PromptRecord], torch.Tensor]:
    """Random records, each tag equally often, and their renders (count, 3, 32, 32) uint8."""
    by_tag: dict[str, list[PromptRecord]] = {}
    for record in lab_prompts(split):
        by_tag.setdefault(record["tag"], []).append(record)
    tags = rng.choice(list(by_tag), size=count)
    records = [by_tag[tag][rng.integers(len(by_tag[tag]))] for tag in tags]
    return records, torch.from_numpy(render_images(records, rng)).permute(0, 3, 1, 2)
