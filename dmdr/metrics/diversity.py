"""Measure how much the images of one prompt differ, by the mean distance over their pairs; lpips.py has LPIPS.

diversity/pixels     root mean square difference of RGB values in [0, 1]
diversity/<reward>   cosine distance, 1 - cos, of the image embeddings of a held-out lab reward

S images of a prompt, P prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

PIXELS = "diversity/pixels"
Embed = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, H, W) in [0, 1] -> (B, D), of length 1
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (P, D), (P, D) -> (P,)


def diversity(images_PS: torch.Tensor, embeddings: dict[str, Embed]) -> dict[str, np.ndarray]:
    """Figure -> scores (P,), NaN where a value of an image is not finite.

    images_PS: (P, S, 3, H, W) in [0, 1], S at least 2. embeddings: the image encoders by the names of their rewards.
    """
    finite_P = images_PS.isfinite().flatten(1).all(dim=1).cpu().numpy()
    images_PS = images_PS.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    scores = {PIXELS: average_over_pairs(images_PS.flatten(2), root_mean_square)}
    for name, embed in embeddings.items():
        vectors_PS = embed(images_PS.flatten(0, 1)).unflatten(0, images_PS.shape[:2])
        scores[f"diversity/{name}"] = average_over_pairs(vectors_PS, cosine_distance)
    return {figure: np.where(finite_P, scores_P, np.nan) for figure, scores_P in scores.items()}


def root_mean_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sqrt(mean (a - b)^2) over the last dimension."""
    return (a - b).square().mean(-1).sqrt()


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - a . b over the last dimension; a and b have length 1."""
    return 1 - (a * b).sum(-1)


def average_over_pairs(x_PSD: torch.Tensor, distance: Distance) -> np.ndarray:
    """The mean distance (P,) over all pairs of S, one pair at a time, so that memory does not grow with the pairs."""
    pairs = list(itertools.combinations(range(x_PSD.shape[1]), 2))
    total_P = torch.zeros(len(x_PSD), dtype=torch.float64, device=x_PSD.device)
    for a, b in pairs:
        total_P += distance(x_PSD[:, a].double(), x_PSD[:, b].double())
    return (total_P / len(pairs)).cpu().numpy()
