"""The schedules DynaDG and DynaRS (DMDR, 3.3) as functions of the student update.

1. Both follow one factor, 0.5 (1 + cos(pi u / U)), exactly 0 from update U on ("official demo").
2. We draw levels by the inverse distribution function, so that they too are a pure function of a generator.
"""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv

from dmdr.config.run import Dynamic


def progress(update: int, dynamic: Dynamic) -> float:
    """1 at update 0, 0 from `dynamic.updates` on; a constant schedule stays at 1; `updates: 0` is always 0."""
    if dynamic.updates == 0:
        return 0.0
    if dynamic.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * update / dynamic.updates)) if update < dynamic.updates else 0.0


def real_scale(update: int, dynamic: Dynamic) -> float:
    """DynaDG: the LoRA scale of the real score. At 0 the real score is the untouched teacher."""
    return dynamic.real_scale * progress(update, dynamic)


def renoise_beta(update: int, dynamic: Dynamic) -> tuple[float, float]:
    """DynaRS: (a, b) of Beta(a, b), from the biased start to (1, 1), which is uniform."""
    start_a, start_b = dynamic.renoise
    f = progress(update, dynamic)
    return 1 + (start_a - 1) * f, 1 + (start_b - 1) * f


def renoise_levels(
    beta: tuple[float, float], span: tuple[float, float], count: int, generator: torch.Generator
) -> torch.Tensor:
    """(count,) float32 renoise levels t ~ Beta(a, b), squeezed linearly into `span`."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    t = torch.from_numpy(betaincinv(*beta, uniform.numpy()))
    low, high = span
    return (low + (high - low) * t).float()
