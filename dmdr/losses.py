"""The losses: pure functions of tensors. Every x0 and prediction is (B, C, H, W); every loss is a scalar.

Suffixes in RL: P prompts or pairs, G images of a prompt, A actions. A log ratio is a difference of log-likelihoods,
which are means over C, H, W.

1. `decouple_real_score` is not in the paper. It is Decoupled-DMD's (arXiv 2511.22677, equation 8), the recipe of
   Z-Image. Their t = 0 is noise, ours is data. They write the two parts as one loss, -((s_real_cond - s_fake)(x_DM) +
   (g - 1)(s_real_cond - s_real_uncond)(x_CA)); we write the same as an x0_real, so that one loss serves both forms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dmdr.path import per_sample


def distribution_matching(
    x0: torch.Tensor,
    x0_real: torch.Tensor,
    x0_fake: torch.Tensor,
    floor: float = 0.0,
    weights_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss whose gradient in x0 is the difference of the scores (DMDR, equation 1), weighted as in DMD, equation 8.

    grad = (x0_fake - x0_real) / (mean |x0 - x0_real| + floor), the mean over C, H, W of each sample, times its weight;
    L = 0.5 |x0 - stop_gradient(x0 - grad)|^2, averaged over all elements.
    """
    with torch.no_grad():
        distance = (x0 - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True) + floor
        grad = torch.nan_to_num((x0_fake - x0_real) / distance)
        if weights_B is not None:
            grad = per_sample(weights_B, x0) * grad
    return 0.5 * F.mse_loss(x0, (x0 - grad).detach())


def decouple_real_score(
    x0_DM: torch.Tensor, x0_CA: torch.Tensor, x0_CA_uncond: torch.Tensor, guidance_scale: float | torch.Tensor
) -> torch.Tensor:
    """x0_real = cond(x_DM) + (g - 1)(cond - uncond)(x_CA): matching and CFG, each at a renoise level of its own.

    x0_DM: with the prompt, where the fake score is compared. x0_CA, x0_CA_uncond: with and without the prompt, where
    CFG is taken ("CFG augmentation"). At one level and noise it is plain CFG (Decoupled-DMD, equation 8).
    """
    return x0_DM + (guidance_scale - 1) * (x0_CA - x0_CA_uncond)


def fake_score(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_diff = |prediction - target|^2. The target is the velocity or noise of renoised student samples (DMDR, 3.1)."""
    return F.mse_loss(prediction, target)


def refl(rewards: torch.Tensor) -> torch.Tensor:
    """L = -mean reward, differentiated through reward, decoder and student (ReFL, algorithm 1; map phi = identity)."""
    return -rewards.mean()


def refl_log(rewards: torch.Tensor) -> torch.Tensor:
    """L = -mean log reward, for rewards above 0 (ReFL, algorithm 1; map phi = log)."""
    return -rewards.clamp(min=torch.finfo(rewards.dtype).tiny).log().mean()


def refl_hinge(rewards: torch.Tensor, margin: float) -> torch.Tensor:
    """L = mean max(0, margin - reward): a reward is raised until it reaches the margin ("authors' code, t2i")."""
    return F.relu(margin - rewards).mean()


def pretraining(x0: torch.Tensor, x0_reference: torch.Tensor) -> torch.Tensor:
    """L = |x0 - x0_reference|^2: the student should predict what the reference predicts (ReFL's pretraining loss)."""
    return F.mse_loss(x0, x0_reference)


def advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (standard deviation + 1e-4) in each group: (P, G). Exactly 0 if all are equal (GRPO, 4.1)."""
    r = rewards_PG.double()  # the mean of equal float32 numbers is exactly that number only in float64
    centred = r - r.mean(dim=1, keepdim=True)
    return (centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-4)).to(rewards_PG.dtype)


def weigh_by_advantage(rewards_B: torch.Tensor, strength: float) -> torch.Tensor:
    """exp(strength A), divided by its mean over the batch, for the advantages A of the batch: (B,).

    Exactly 1 where the strength is 0 or all rewards are equal (advantage-weighted regression, Peng et al. 2019,
    equation 9, of which the mean is ours).
    """
    weights = (strength * advantages(rewards_B.double()[None])[0]).exp()
    return (weights / weights.mean()).to(rewards_B.dtype)


def branch_advantages(rewards_SG: torch.Tensor) -> torch.Tensor:
    """(r - mean of its group) / deviation, the root mean square of the numerators of all groups that differ: (S, G).

    A group of equal rewards has advantages of exactly 0, and no group is inflated to the size of the others
    (the deviation over all groups: Flow-GRPO's code, RTDMD; a deviation of each group: GRPO, 4.1).
    """
    r = rewards_SG.double()  # as in `advantages`
    centred = (r - r.mean(dim=1, keepdim=True)) * find_differing(r)[:, None]
    return (centred / deviation_of_groups(r)).to(rewards_SG.dtype)


def deviation_of_groups(rewards_SG: torch.Tensor) -> torch.Tensor:
    """The root mean square of reward - mean of its group, over all groups that differ; 1 if none does."""
    r = rewards_SG.double()
    differ = find_differing(r)
    variance = (r.var(dim=1, correction=0) * differ).sum() / differ.sum().clamp(min=1)
    return torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))


def find_differing(rewards_SG: torch.Tensor) -> torch.Tensor:
    """(S,) which groups have rewards that differ."""
    return rewards_SG.amax(1) > rewards_SG.amin(1)


def grpo(log_ratio_A: torch.Tensor, advantages_A: torch.Tensor, clip_range: float) -> torch.Tensor:
    """L = -mean min(r A, clip(r, 1 - e, 1 + e) A), r = exp(log ratio to the student of the rollout) (GRPO, eq. 3)."""
    ratio = log_ratio_A.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages_A, clipped * advantages_A).sum() / max(len(ratio), 1)


def gaussian_kl(x0: torch.Tensor, x0_reference: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """KL of N(signal x0, spread^2) from N(signal x0_reference, spread^2), averaged over all elements.

    0.5 ratio^2 |x0 - x0_reference|^2 with ratio (B,) = signal / spread (Flow-GRPO, section 3.2, for equal variances).
    """
    return (0.5 * (per_sample(ratio, x0) * (x0 - x0_reference)).square()).sum() / max(x0.numel(), 1)


def gain_of_pairs(rewards: torch.Tensor, *, log: bool = False) -> torch.Tensor:
    """R(x0 + d e) - R(x0 - d e), or the difference of their logarithms, of the rewards (..., 2) of pairs: (...)."""
    if log:
        rewards = rewards.clamp(min=torch.finfo(rewards.dtype).tiny).log()
    return rewards[..., 0] - rewards[..., 1]


def estimate_gradient(noise: torch.Tensor, gains_SK: torch.Tensor, deviation: float) -> torch.Tensor:
    """mean over K of gain e / (2 d), for noise e (S, K, C, H, W): (S, C, H, W).

    Its mean is the gradient in x0 of the mean of R under N(x0, d^2) (antithetic evolution strategies, Salimans et al.
    2017, equation 1 and section 2.1).
    """
    return torch.einsum("sk,skchw->schw", gains_SK.to(noise.dtype), noise) / (2 * deviation * noise.shape[1])


def dpo(gain_w_P: torch.Tensor, gain_l_P: torch.Tensor, beta: float, ranked_P: torch.Tensor) -> torch.Tensor:
    """L = -mean log sigmoid(beta (gain of the winner - gain of the loser)), gain = log ratio to the reference.

    DPO, equation 7. A pair with ranked_P = 0 is a tie, and its loss is 0.
    """
    losses_P = -F.logsigmoid(beta * (gain_w_P - gain_l_P)) * ranked_P
    return losses_P.sum() / max(len(losses_P), 1)
