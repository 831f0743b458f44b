"""Score a lab teacher with the judge of its world, on held-out prompts: with CFG, without CFG, and in 4 steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dmdr.backbones.protocol import Backbone
from dmdr.config.prompt_record import PromptRecord
from dmdr.noise import noise_for
from dmdr.rollout import sample_teacher
from dmdr.teacher.load import load_teacher

BATCH = 100


class Judge(Protocol):
    """A metric of the lab that judges images."""

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of its scores."""

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], Sequence[object]]:
        """The scores (B,) by name of images (B, 3, H, W) in [0, 1], and a line of results for each image."""


def measure(
    backbone: Backbone, judge: Judge, records: Sequence[PromptRecord], steps: int, guidance_scale: float
) -> dict[str, float]:
    """Sample one image for each record, and average each of the judge's scores over the images."""
    scores_of: dict[str, list[np.ndarray]] = {figure: [] for figure in judge.figures}
    empty = backbone.collate(backbone.encode([""])[0])
    for start in range(0, len(records), BATCH):
        part = list(records[start : start + BATCH])
        c = backbone.collate(backbone.encode([record["prompt"] for record in part])[0])
        noise = noise_for(0, "lab scores", start, shape=(len(part), *backbone.latent_shape))
        times = backbone.teacher_times(steps)
        x0 = sample_teacher(backbone, c, empty, guidance_scale=guidance_scale, times=times, noise=noise)
        with torch.no_grad():
            images = backbone.decode(x0)
        for figure, scores in judge(images, part)[0].items():
            scores_of[figure].append(scores)
    means = {figure: float(np.concatenate(scores).mean()) for figure, scores in scores_of.items()}
    prompts = len({record["prompt"] for record in records})
    return {"steps": steps, "guidance_scale": guidance_scale, "prompts": prompts, "images": len(records), **means}


def score_teacher(
    folder: Path, judge: Judge, records: Sequence[PromptRecord], *, guidance_scale: float
) -> dict[str, dict[str, float]]:
    """Score the teacher in `folder`, as scores.json records it: with CFG and without at 25 steps, and without at 4."""
    backbone = load_teacher(folder)
    return {
        "teacher": measure(backbone, judge, records, 25, guidance_scale),
        "without CFG": measure(backbone, judge, records, 25, 1.0),
        "naive, 4 steps": measure(backbone, judge, records, 4, 1.0),
    }
