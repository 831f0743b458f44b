"""Keep the frozen weights of a network in half precision where that changes no number.

Most text encoders are published in float16 or bfloat16, and `load.py` loads them in float32. A weight that either of
the two holds exactly is stored so, and converted back for each use: the same results from half of the memory.
Embeddings and norms stay, because a network's first weight tells libraries the dtype of its results.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize


class ToFloat32(nn.Module):
    """A stored weight as the network computes with it."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float()


def store_in_half(network: nn.Module) -> None:
    """Store the weights of all linear layers of a float32 network in the shortest dtype that holds them exactly."""
    for module in list(network.modules()):
        if isinstance(module, nn.Linear) and (half := _find_half(module.weight)) is not None:
            module.weight = nn.Parameter(half, requires_grad=False)
            parametrize.register_parametrization(module, "weight", ToFloat32(), unsafe=True)


def _find_half(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in half precision; None if neither dtype holds all its numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        half = weight.detach().to(dtype)
        if torch.equal(half.float(), weight):
            return half
    return None
