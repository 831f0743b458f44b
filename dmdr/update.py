"""The algorithm. A window of DMDR: a rollout, K - 1 updates of the fake score, one of the student with the K-th.

The student does not change inside a window, so one rollout serves all of it: its N states for each trajectory are
on-policy samples for the fake score and inputs for the student alike.
1. Every state is used: (K - 1) B samples for the fake score cost (K - 1) F, where a fresh rollout for each of the K
   updates costs K N F. B is the batch, F one forward of the base.
2. On the student's step the fake score is run once: its prediction serves the score, then, on the same renoised
   sample, its own loss. Its graph is kept, so real (2 B, no graph) and fake (B) are two calls, not one of 3 B.
3. RL uses the student's own forward of that step, whatever the algorithm.
Cost with CFG and a full student: (K - 1) F rollout + (K - 1)(F + b) + 3 F student + 3 F scores + b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr import distributed, losses
from dmdr.backbones import Conditioning
from dmdr.backbones.scores import STUDENT, SharedBase
from dmdr.rollout import States, backward_simulation


@dataclass(frozen=True)
class Batch:
    """This rank's states out of those of a batch: x_t and x0 (B, C, H, W), t (B,), conditioning; the step and
    trajectory of each (B,). `rows` are theirs among the `of` states of all ranks."""

    x_t: torch.Tensor
    x0: torch.Tensor
    t: torch.Tensor
    c: Conditioning
    step: torch.Tensor
    trajectory: torch.Tensor
    rows: slice
    of: int

    @property
    def share(self) -> float:
        """What turns the mean over these states into their part of the mean over the states of all ranks."""
        return len(self.t) / self.of


RLLoss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]  # a part, figures of all ranks


@dataclass(frozen=True)
class Weighted:
    """The RL loss beside distribution matching; `matched` multiplies `weight` by |grad of DMD| / |grad of RL| first."""

    loss: RLLoss
    weight: float
    matched: bool = False


@dataclass(frozen=True)
class Renoise:
    """Where the two scores are compared: levels t (B,) and noise (B, C, H, W)."""

    t: torch.Tensor
    noise: torch.Tensor


def trajectories(
    batch_size: int, fake_updates: int, steps: int, *, group_size: int = 1, student_batches: float = 1.0
) -> int:
    """How many rollouts a window needs so that their states suffice for it, in whole groups.

    ceil(B max(K - 1, student_batches) / N); student_batches counts what is rolled out for the student and not used.
    """
    needed = math.ceil(max(fake_updates - 1, student_batches) * batch_size / steps)
    return math.ceil(needed / group_size) * group_size


def rollout(base: SharedBase, c: Conditioning, times: torch.Tensor, noises: torch.Tensor) -> States:
    """Backward simulation of the current student: N states of each trajectory of `noises` (N, M, C, H, W)."""
    return backward_simulation(lambda x_t, t: base.student(x_t, t, c), base.backbone, times=times, noises=noises)


def select(states: States, c: Conditioning, pairs: torch.Tensor, block: int = 1) -> Batch:
    """Of the states with flat index `pairs` into (N steps x M trajectories), this rank's share in whole blocks."""
    blocks = distributed.share(len(pairs) // block)
    rows = slice(blocks.start * block, blocks.stop * block)
    step, trajectory = pairs[rows] // states.x0.shape[1], pairs[rows] % states.x0.shape[1]
    chosen = {key: value[trajectory] for key, value in c.items()}
    x_t, x0 = states.x_t[step, trajectory], states.x0[step, trajectory]
    return Batch(x_t, x0, states.times[step], chosen, step, trajectory, rows, of=len(pairs))


def update_fake_score(
    base: SharedBase, batch: Batch, renoise: Renoise, optimizer: torch.optim.Optimizer, *, clip: float
) -> dict[str, torch.Tensor]:
    """One step of L_diff on the student's samples."""
    path = base.backbone.path
    x_t = path.renoise(batch.x0, renoise.noise, renoise.t)
    prediction = base.fake(x_t, renoise.t, batch.c)
    loss = losses.fake_score(prediction, path.target(batch.x0, renoise.noise)) * batch.share
    grad_fake = _descend(loss, base.fake_parameters, optimizer, clip)
    return {**distributed.totals({"loss_fake": loss.detach()}), "grad_fake": grad_fake}


def update_student(
    base: SharedBase,
    batch: Batch,
    unconditional: Conditioning,
    renoise: Renoise,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    *,
    guidance_scale: float,
    real_scale: float,
    rl: Weighted | None,
    clips: tuple[float, float],
) -> dict[str, torch.Tensor]:
    """L = L_dmd + weight L_rl (DMDR, equation 2) for the student, and the window's last step of the fake score.

    Figures are those of the batch of all ranks.

    Args:
        optimizers, clips: of the student, of the fake score.
        rl: None for distillation only.
    """
    path = base.backbone.path
    x0 = base.student(batch.x_t, batch.t, batch.c)
    sample = x0.detach()

    x_t = path.renoise(sample, renoise.noise, renoise.t)
    x0_real = base.real_x0(x_t, renoise.t, batch.c, unconditional, guidance_scale=guidance_scale, lora_scale=real_scale)
    prediction = base.fake(x_t, renoise.t, batch.c)
    x0_fake = path.to_x0(x_t, prediction.detach(), renoise.t)
    loss_fake = losses.fake_score(prediction, path.target(sample, renoise.noise)) * batch.share
    grad_fake = _descend(loss_fake, base.fake_parameters, optimizers[1], clips[1])

    loss_dm = losses.distribution_matching(x0, x0_real, x0_fake) * batch.share
    loss, figures, parts = loss_dm, {}, {"loss_dm": loss_dm.detach(), "loss_fake": loss_fake.detach()}
    if rl is not None:
        loss_rl, figures = rl.loss(x0, batch)
        with base.wearing(STUDENT, float(base.student_is_lora)):
            weight = (
                _matched(loss_dm, loss_rl, base.student_parameters) if rl.matched else {"rl_weight": torch.ones(())}
            )
        weight["rl_weight"] = weight["rl_weight"] * rl.weight
        figures, parts = {**figures, **weight}, {**parts, "loss_rl": loss_rl.detach()}
        loss = loss + weight["rl_weight"] * loss_rl
    with base.wearing(STUDENT, float(base.student_is_lora)):
        grad_student = _descend(loss, base.student_parameters, optimizers[0], clips[0])
    found = distributed.totals(parts)
    loss_fake = found.pop("loss_fake")
    return {**found, **figures, "loss_fake": loss_fake, "grad_student": grad_student, "grad_fake": grad_fake}


def update_student_by_rl(
    base: SharedBase, batch: Batch, optimizer: torch.optim.Optimizer, rl: Weighted, *, clip: float
) -> dict[str, torch.Tensor]:
    """L = weight L_rl: a row of Table 5, and what distribution matching is measured against. No score is run."""
    loss_rl, figures = rl.loss(base.student(batch.x_t, batch.t, batch.c), batch)
    with base.wearing(STUDENT, float(base.student_is_lora)):
        grad_student = _descend(rl.weight * loss_rl, base.student_parameters, optimizer, clip)
    return {**distributed.totals({"loss_rl": loss_rl.detach()}), **figures, "grad_student": grad_student}


def _matched(
    loss_dm: torch.Tensor, loss_rl: torch.Tensor, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The weight at which the RL gradient is as long as that of distribution matching, and both lengths; 0 without."""

    def length(loss: torch.Tensor) -> torch.Tensor:
        gradients = [each for each in _gradients(loss, list(parameters.values())) if each is not None]
        distributed.sum_in_place(gradients)
        return distributed.whole(torch.nn.utils.get_total_norm(gradients))

    grad_dm, grad_rl = length(loss_dm), length(loss_rl)
    ratio = torch.where(grad_rl > 0, grad_dm / grad_rl, torch.zeros_like(grad_rl))
    return {"rl_weight": ratio, "grad_dm": grad_dm, "grad_rl": grad_rl}


def _gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    """Of the loss, whose graph is kept; no parameter has one yet, and none keeps it."""
    if not distributed.is_split(parameters[0]):
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    for each in parameters:  # FSDP2 has the gathered weights in the graph, and writes the rows' gradients itself
        each.grad = None
    loss.backward(retain_graph=True)
    found = [each.grad for each in parameters]
    for each in parameters:
        each.grad = None
    return found


def _descend(
    loss: torch.Tensor, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, clip: float
) -> torch.Tensor:
    """Backward, sum over the ranks, clip, step; returns the gradient norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [each.grad for each in parameters.values() if each.grad is not None]
    distributed.sum_in_place(gradients)
    norm = distributed.whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)
    optimizer.step()
    return norm
