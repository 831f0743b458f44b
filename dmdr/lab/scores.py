"""How good a lab teacher is: the checker's verdict on held-out prompts, with CFG at 25 steps and naively at 4."""

from __future__ import annotations

from pathlib import Path

import torch

from dmdr import teacher
from dmdr.backbones import Backbone
from dmdr.lab.checker import check
from dmdr.lab.prompts import lab_prompts
from dmdr.rollout import noise_for, teacher_sample


def strict_and_soft(backbone: Backbone, steps: int, guidance_scale: float, count: int) -> dict[str, float]:
    """Mean strict and soft score of `count` held-out prompts, one image each."""
    records, verdicts = lab_prompts("held-out")[:count], []
    empty = backbone.collate(backbone.encode([""])[0])
    for start in range(0, count, 100):
        part = records[start : start + 100]
        c = backbone.collate(backbone.encode([record["prompt"] for record in part])[0])
        noise = noise_for(0, "lab scores", start, shape=(len(part), *backbone.latent_shape))
        times = backbone.teacher_times(steps)
        x0 = teacher_sample(backbone, c, empty, guidance_scale=guidance_scale, times=times, noise=noise)
        with torch.no_grad():
            images = (backbone.decode(x0) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        verdicts += [check(record, image) for record, image in zip(part, images, strict=True)]
    strict, soft = (sum(getattr(v, name) for v in verdicts) / len(verdicts) for name in ("strict", "soft"))
    return {"steps": steps, "guidance_scale": guidance_scale, "prompts": len(verdicts), "strict": strict, "soft": soft}


def teacher_scores(folder: Path, guidance_scale: float, count: int = 1200) -> dict[str, dict[str, float]]:
    """What the recipe's record says of a teacher folder."""
    backbone = teacher.load(folder)
    return {
        "teacher": strict_and_soft(backbone, 25, guidance_scale, count),
        "without CFG": strict_and_soft(backbone, 25, 1.0, count),
        "naive, 4 steps": strict_and_soft(backbone, 4, 1.0, count),
    }
