"""How much the images of one prompt differ from each other: mean distance over their pairs. Neither figure is LPIPS.

diversity/pixels     root mean square difference of RGB values in [0, 1]
diversity/<reward>   cosine distance, 1 - cos, of the image embedding of a held-out lab reward

S images of a prompt, P prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

PIXELS = "diversity/pixels"
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def diversity(images_PS: torch.Tensor, embeddings: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> dict:
    """Figure -> scores (P,), NaN where an image is not a number.

    images_PS: (P, S, 3, H, W) in [0, 1], S at least 2. embeddings: reward -> (B, 3, H, W) to (B, D) of length 1.
    """
    sound_P = images_PS.isfinite().flatten(1).all(dim=1).cpu().numpy()
    images_PS = images_PS.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    found = {PIXELS: _mean_over_pairs(images_PS.flatten(2), lambda a, b: (a - b).square().mean(-1).sqrt())}
    for name, embed in embeddings.items():
        vectors_PS = embed(images_PS.flatten(0, 1)).unflatten(0, images_PS.shape[:2])
        found[f"diversity/{name}"] = _mean_over_pairs(vectors_PS, lambda a, b: 1 - (a * b).sum(-1))
    return {figure: np.where(sound_P, scores_P, np.nan) for figure, scores_P in found.items()}


def _mean_over_pairs(x_PSD: torch.Tensor, distance: Distance) -> np.ndarray:
    """Two at a time, so that the memory does not grow with the pairs."""
    pairs = list(itertools.combinations(range(x_PSD.shape[1]), 2))
    total = sum(distance(x_PSD[:, a].double(), x_PSD[:, b].double()) for a, b in pairs)
    return (total / len(pairs)).cpu().numpy()
