"""The schedules DynaDG and DynaRS (DMDR, 3.3) as functions of the student update.

1. Both follow the same factor, 0.5 (1 + cos(pi u / U)), which is exactly 0 from update U on ("official demo").
2. Levels are sampled by the inverse distribution function, so that each is a function of one uniform number.
"""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv

from dmdr.config.training import Dynamic


def progress(update: int, dynamic: Dynamic) -> float:
    """The factor of both schedules: 1 at update 0, and 0 from update `dynamic.updates` on.

    A constant schedule stays at 1. With `updates: 0` the factor is always 0.
    """
    if dynamic.updates == 0:
        return 0.0
    if dynamic.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * update / dynamic.updates)) if update < dynamic.updates else 0.0


def real_scale(update: int, dynamic: Dynamic) -> float:
    """DynaDG: the LoRA scale of the real score. At 0 the real score is that of the unchanged teacher."""
    return dynamic.real_scale * progress(update, dynamic)


def renoise_beta(update: int, dynamic: Dynamic) -> tuple[float, float]:
    """DynaRS: (a, b) of Beta(a, b), from the biased start to the uniform (1, 1)."""
    start_a, start_b = dynamic.renoise
    factor = progress(update, dynamic)
    return 1 + (start_a - 1) * factor, 1 + (start_b - 1) * factor


def renoise_levels(beta: tuple[float, float], span: tuple[float, float], uniform: torch.Tensor) -> torch.Tensor:
    """(B,) float32 renoise levels: t ~ Beta(a, b), scaled linearly from [0, 1] to `span`.

    uniform: (B,) float64 in [0, 1), of which the levels are a function.
    """
    t = torch.from_numpy(betaincinv(*beta, uniform.numpy()))
    low, high = span
    return (low + (high - low) * t).float()
