"""The algorithm. A window of DMDR: a rollout, K - 1 updates of the fake score, one of the student with the K-th.

The student does not change inside a window, so one rollout serves all of it: its N states for each trajectory are
on-policy samples for the fake score and inputs for the student alike.
1. Every state is used: (K - 1) B samples for the fake score cost (K - 1) F, where a fresh rollout for each of the K
   updates costs K N F. B is the batch, F one forward of the base.
2. On the student's step the fake score is run once: its prediction serves the score, then, on the same renoised
   sample, its own loss. Its graph is kept, so real (2 B, no graph) and fake (B) are two calls, not one of 3 B.
3. RL uses the student's own forward of that step, whatever the algorithm.
4. A batch may be run in parts, whose gradients add up: the same update in less memory.
Cost with CFG and a full student: (K - 1) F rollout + (K - 1)(F + b) + 3 F student + 3 F scores + b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmdr import distributed, losses
from dmdr.backbones.protocol import Conditioning
from dmdr.rollout import States, simulate_backward
from dmdr.shared_base import STUDENT, SharedBase


@dataclass(frozen=True)
class Batch:
    """States out of those of a global batch: x_t and x0 (B, C, H, W), t (B,), conditioning; the step and trajectory of
    each (B,). `rows` are theirs among the `of` states of all ranks; `acting` of those went on to a renoising step.
    """

    x_t: torch.Tensor
    x0: torch.Tensor
    t: torch.Tensor
    c: Conditioning
    step: torch.Tensor
    trajectory: torch.Tensor
    rows: slice
    of: int
    acting: int

    @property
    def share(self) -> float:
        """What turns the mean over these states into their part of the mean over the global batch."""
        return len(self.t) / self.of


RLLoss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]  # parts, to be summed


@dataclass(frozen=True)
class Weighted:
    """The RL loss beside distribution matching; `matched` multiplies `weight` by |grad of DMD| / |grad of RL| first."""

    loss: RLLoss
    weight: float
    matched: bool = False


@dataclass(frozen=True)
class Renoise:
    """Where the two scores of a global batch are compared: levels t (B,) and noise (B, C, H, W)."""

    t: torch.Tensor
    noise: torch.Tensor

    def of(self, batch: Batch) -> Renoise:
        """Those of its states, on their device."""
        return Renoise(self.t[batch.rows].to(batch.x0), self.noise[batch.rows].to(batch.x0))


def count_trajectories(
    batch_size: int, fake_updates: int, steps: int, *, group_size: int = 1, student_batches: float = 1.0
) -> int:
    """How many rollouts a window needs so that their states suffice for it, in whole groups.

    ceil(B max(K - 1, student_batches) / N); student_batches counts what is rolled out for the student and not used.
    """
    needed = math.ceil(max(fake_updates - 1, student_batches) * batch_size / steps)
    return math.ceil(needed / group_size) * group_size


def roll_out(base: SharedBase, c: Conditioning, times: torch.Tensor, noises: torch.Tensor) -> States:
    """Backward simulation of the current student: N states of each trajectory of `noises` (N, M, C, H, W)."""
    return simulate_backward(lambda x_t, t: base.student(x_t, t, c), base.backbone, times=times, noises=noises)


def select_states(
    states: States, c: Conditioning, pairs: torch.Tensor, *, block: int = 1, most: int | None = None
) -> list[Batch]:
    """Of the states with flat index `pairs` into (N steps x M trajectories), this rank's share, in whole blocks, and
    that in parts of at most `most` states, equally many on all ranks."""
    steps, count = states.x0.shape[:2]
    blocks = distributed.split_evenly(len(pairs) // block)
    acting = int((pairs // count < steps - 1).sum())
    batches = []
    for part in distributed.split_batches(blocks, len(pairs) // block, most and max(1, most // block)):
        rows = slice(part.start * block, part.stop * block)
        step, trajectory = pairs[rows] // count, pairs[rows] % count
        chosen = {key: value[trajectory] for key, value in c.items()}
        x_t, x0 = states.x_t[step, trajectory], states.x0[step, trajectory]
        batches.append(Batch(x_t, x0, states.times[step], chosen, step, trajectory, rows, of=len(pairs), acting=acting))
    return batches


def update_fake_score(
    base: SharedBase, batches: list[Batch], renoise: Renoise, optimizer: torch.optim.Optimizer, *, clip: float
) -> dict[str, torch.Tensor]:
    """One step of L_diff on the student's samples; the parts of a batch are run one after another."""
    path, figures = base.backbone.path, Sums()
    optimizer.zero_grad()
    for batch in batches:
        levels = renoise.of(batch)
        prediction = base.fake(path.renoise(batch.x0, levels.noise, levels.t), levels.t, batch.c)
        loss = losses.fake_score(prediction, path.target(batch.x0, levels.noise)) * batch.share
        loss.backward()
        figures.add({"loss_fake": loss})
    grad_fake = _optimizer_step(base.fake_parameters, optimizer, clip)
    return {**figures.of_all_ranks(), "grad_fake": grad_fake}


def update_student(
    base: SharedBase,
    batches: list[Batch],
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

    The parts of a batch are run one after another; figures are those of the batch of all ranks.

    Args:
        optimizers, clips: of the student, of the fake score.
        rl: None for distillation only.
    """
    path, figures = base.backbone.path, Sums()
    parameters = list(base.student_parameters.values())
    gradients_dm, gradients_rl = Gradients(parameters), Gradients(parameters)  # of a weight that is to be matched
    for optimizer in optimizers:
        optimizer.zero_grad()
    for batch in batches:
        x0, levels = base.student(batch.x_t, batch.t, batch.c), renoise.of(batch)
        sample = x0.detach()

        x_t = path.renoise(sample, levels.noise, levels.t)
        x0_real = base.real_x0(
            x_t, levels.t, batch.c, unconditional, guidance_scale=guidance_scale, lora_scale=real_scale
        )
        prediction = base.fake(x_t, levels.t, batch.c)
        x0_fake = path.to_x0(x_t, prediction.detach(), levels.t)
        loss_fake = losses.fake_score(prediction, path.target(sample, levels.noise)) * batch.share
        loss_fake.backward()

        loss = loss_dm = losses.distribution_matching(x0, x0_real, x0_fake) * batch.share
        figures.add({"loss_dm": loss_dm, "loss_fake": loss_fake})
        if rl is not None:
            loss_rl, found = rl.loss(x0, batch)
            figures.add({"loss_rl": loss_rl, **found})
            loss = loss_dm + rl.weight * loss_rl
        with base.use_adapter(STUDENT, float(base.student_is_lora)):
            if rl is not None and rl.matched:
                gradients_dm.add(loss_dm)
                gradients_rl.add(loss_rl)
            else:
                loss.backward()
    weight = {}
    if rl is not None:
        weight = (
            _match_weight(gradients_dm, gradients_rl, rl.weight)
            if rl.matched
            else {"rl_weight": torch.tensor(rl.weight)}
        )
    grad_fake = _optimizer_step(base.fake_parameters, optimizers[1], clips[1])
    grad_student = _optimizer_step(base.student_parameters, optimizers[0], clips[0])
    return {**figures.of_all_ranks(), **weight, "grad_student": grad_student, "grad_fake": grad_fake}


def update_student_by_rl(
    base: SharedBase, batches: list[Batch], optimizer: torch.optim.Optimizer, rl: Weighted, *, clip: float
) -> dict[str, torch.Tensor]:
    """L = weight L_rl: a row of Table 5, and what distribution matching is measured against. No score is run."""
    figures = Sums()
    optimizer.zero_grad()
    for batch in batches:
        loss_rl, found = rl.loss(base.student(batch.x_t, batch.t, batch.c), batch)
        figures.add({"loss_rl": loss_rl, **found})
        with base.use_adapter(STUDENT, float(base.student_is_lora)):
            (rl.weight * loss_rl).backward()
    return {**figures.of_all_ranks(), "grad_student": _optimizer_step(base.student_parameters, optimizer, clip)}


class Sums:
    """Figures of the parts of a batch, each its part of the whole batch's."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def add(self, part: dict[str, torch.Tensor]) -> None:
        for name, value in part.items():
            self.values[name] = self.values.get(name, 0) + value.detach()

    def of_all_ranks(self) -> dict[str, torch.Tensor]:
        """Sums over parts and ranks; reward_square/NAME, a mean square, becomes reward_std/NAME, a deviation."""
        found = distributed.all_reduce_sums(self.values)
        for name in [name for name in found if name.startswith("reward_square/")]:
            of = name.removeprefix("reward_square/")
            spread = (found.pop(name) - found[f"reward/{of}"].square()).clamp(min=0).sqrt()
            found[f"reward_std/{of}"] = spread
        return found


class Gradients:
    """The sum over parts of the gradient of a loss, apart from what the parameters hold."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters, self.sums = parameters, [None] * len(parameters)

    def add(self, loss: torch.Tensor) -> None:
        """The graph is kept."""
        found = _gradients(loss, self.parameters)
        self.sums = [
            new if old is None else old if new is None else old + new for old, new in zip(self.sums, found, strict=True)
        ]

    def norm(self) -> torch.Tensor:
        """Of the sum over all ranks."""
        found = [each.clone() for each in self.sums if each is not None]
        distributed.all_reduce_in_place(found)
        return distributed.full_tensor(torch.nn.utils.get_total_norm(found))


def _gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    """Of the loss, whose graph is kept; no parameter has one yet, and none keeps it."""
    if not distributed.is_sharded(parameters[0]):
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    loss.backward(retain_graph=True)  # FSDP2's graph has the gathered weights; it writes the rows' gradients itself
    found = [each.grad for each in parameters]
    for each in parameters:
        each.grad = None
    return found


def _match_weight(dm: Gradients, rl: Gradients, weight: float) -> dict[str, torch.Tensor]:
    """Leave dm + weight |dm| / |rl| rl with the parameters; returns that weight, 0 where rl is 0, and the lengths."""
    grad_dm, grad_rl = dm.norm(), rl.norm()
    rl_weight = weight * torch.where(grad_rl > 0, grad_dm / grad_rl, torch.zeros_like(grad_rl))
    for parameter, of_dm, of_rl in zip(dm.parameters, dm.sums, rl.sums, strict=True):
        if of_dm is not None or of_rl is not None:
            parameter.grad = of_dm if of_rl is None else rl_weight * of_rl + (0 if of_dm is None else of_dm)
    return {"rl_weight": rl_weight, "grad_dm": grad_dm, "grad_rl": grad_rl}


def _optimizer_step(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, clip: float
) -> torch.Tensor:
    """Sum the gradients over the ranks, clip, step; returns their norm before clipping."""
    gradients = [each.grad for each in parameters.values() if each.grad is not None]
    distributed.all_reduce_in_place(gradients)
    norm = distributed.full_tensor(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)
    optimizer.step()
    return norm
