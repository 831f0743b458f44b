"""Whether two halves of RL's batch pull the same way: what `dmdr signal` measures, in its cheap form, beside each look.

1. The figure is the cosine, in the student's parameters, of the gradients of two halves of the states that GRPO, DPO
   or evolution strategies learn from, of different prompts. It is near 0 if the gradient is mostly noise. A shared bias
   raises it as a signal does. One batch tells little: read the mean over the looks.
2. It costs two forwards and two backward passes of RL's states at each look, 6 F of them. Counted, that is 0.3 % of the
   updates from one look to the next with the default settings, 1 % with whole images, and a quarter of the look itself.
   It changes no bit of what is trained.
3. ReFL is the reward's gradient, and a surrogate has a fit on scores that it has not seen: they have no such figure.
"""

from __future__ import annotations

import torch

from dmdr.optimizers import GradientSum
from dmdr.rl.objective import Objective
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.transfer import send_to
from dmdr.update import Batch

RL_HALVES = "watch/rl_halves"


def compare_halves(base: SharedBase, window: Window, objective: Objective, *, group: int) -> dict[str, torch.Tensor]:
    """The cosine of the gradients of both halves of RL's states; 0 where a half has no gradient.

    window: that RL has seen. group: neighbours among its trajectories that stay in one half.
    """
    order = torch.randperm(window.trajectories // group, generator=window.generator("halves of RL's batch"))
    half_of = (order % 2)[torch.arange(window.trajectories) // group]
    numbers = torch.tensor(range(window.trajectories) if window.numbers is None else window.numbers)
    halves = [GradientSum(list(base.student_parameters.values())) for _ in range(2)]
    for batch in (batch for parts in objective.batches for batch in parts):
        towards = find_gradient(objective, batch)
        for side, total in enumerate(halves):
            mask = send_to((half_of[numbers[batch.trajectory]] == side).to(towards.dtype), towards.device)
            x0 = base.student(batch.x_t, batch.t, batch.c)
            total.add((x0 * towards * mask[:, None, None, None]).sum())
    norms = [total.norm() for total in halves]
    return {RL_HALVES: torch.nan_to_num(halves[0].dot(halves[1]) / (norms[0] * norms[1]))}


def find_gradient(objective: Objective, batch: Batch) -> torch.Tensor:
    """The gradient of an objective's loss in the x0 of a batch, at the student of the rollout: (B, C, H, W)."""
    x0 = batch.x0.detach().clone().requires_grad_(True)
    assert objective.loss is not None, "a weighting has no gradient of its own"
    loss, _ = objective.loss(x0, batch)
    return torch.autograd.grad(loss, x0)[0]
