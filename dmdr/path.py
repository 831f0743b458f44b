"""THE time convention: t = 0 is data, t = 1 is noise. Every x0, x_t and noise is (B, C, H, W); every t is (B,).

The flow path (SD3, rectified flow): x_t = (1 - t) x0 + t noise, and the network predicts the velocity noise - x0.
"""

from __future__ import annotations

import torch


def per_sample(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (B,) shaped to broadcast over `like` (B, ...), in its dtype."""
    return t.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


class FlowPath:
    """Straight lines from data to noise."""

    def renoise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = (1 - t) x0 + t noise."""
        t = per_sample(t, x0)
        return (1 - t) * x0 + t * noise

    def to_x0(self, x_t: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 = x_t - t v."""
        return x_t - per_sample(t, x_t) * velocity

    def target(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network learns to predict: v = noise - x0."""
        return noise - x0

    def step(self, x_t: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """One Euler step of the probability flow ODE, dx = v dt."""
        return x_t + per_sample(t_next - t, x_t) * velocity
