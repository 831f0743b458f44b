"""The losses: pure functions of tensors. Every x0 and prediction is (B, C, H, W); every loss is a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distribution_matching(x0: torch.Tensor, x0_real: torch.Tensor, x0_fake: torch.Tensor) -> torch.Tensor:
    """The loss whose gradient in x0 is the difference of the two scores (DMDR, equation 1; weight of DMD, equation 8).

    grad = (x0_fake - x0_real) / mean |x0 - x0_real|, the mean over C, H, W of each sample;
    L = 0.5 |x0 - stop_gradient(x0 - grad)|^2, averaged over all elements.
    """
    with torch.no_grad():
        weight = (x0 - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True)
        grad = torch.nan_to_num((x0_fake - x0_real) / weight)
    return 0.5 * F.mse_loss(x0, (x0 - grad).detach())


def fake_score(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_diff = |prediction - target|^2; the target is the velocity or noise of renoised student samples (DMDR, 3.1)."""
    return F.mse_loss(prediction, target)


def refl(rewards: torch.Tensor) -> torch.Tensor:
    """L = -mean reward, differentiated through reward, decoder and student (ReFL, algorithm 1, without its map)."""
    return -rewards.mean()
