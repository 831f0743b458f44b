"""The algorithm. A training step is a rollout, K - 1 updates of the fake score, and one of the student with the K-th.

The student does not change between its updates, so one rollout serves the whole training step: its N states for each
trajectory are on-policy samples for the fake score and inputs for the student.
1. Every state is used: (K - 1) B samples for the fake score cost (K - 1) F, where a fresh rollout for each of the K
   updates costs K N F. B is the batch, F one forward of the base.
2. The student's update runs the fake score once. Its prediction serves the score and, on the same renoised sample,
   its own loss. Its graph is kept, so real (2 B, no graph) and fake (B) are two calls, not one of 3 B.
3. ReFL uses the student's own forward of that update. GRPO, DPO and evolution strategies (ES) have states of their own,
   which change nothing in what distribution matching and the fake score see: 3 F for as many states as the batch has.
4. Where RL's gradient is clipped apart (GRPO, DPO, ES, a matched weight), it is summed apart: one more backward pass.
5. A batch may run in parts whose gradients add up: the same update in less memory.
6. Decoupled levels (Decoupled-DMD, arXiv 2511.22677, equation 8) take the CFG of the real score at a sample of its own:
   real is then B and 2 B, one F more.
Cost with CFG and a full student: (K - 1) F rollout + (K - 1)(F + b) + 3 F student + 3 F scores + b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dmdr import distributed, losses
from dmdr.backbones.protocol import Conditioning
from dmdr.optimizers import Balance, GradientSum, Trainable
from dmdr.path import per_sample
from dmdr.rollout import States, simulate_backward
from dmdr.shared_base import FAKE, SharedBase
from dmdr.transfer import send, send_to


@dataclass(frozen=True)
class Batch:
    """A part of a global batch of states.

    x_t, x0: (B, C, H, W). t: (B,). c: their conditioning. step, trajectory: (B,) where each stands in this rank's part
    of the rollout. rows: where they stand among the states of the batch that this rank has. of: states in the batch.
    """

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
        """Times this, the mean over these states is their part of the mean over the global batch."""
        return len(self.t) / self.of


RLLoss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]  # x0, batch -> loss, figures


@dataclass(frozen=True)
class WeightedLoss:
    """The RL loss of one update of the student, and its weight beside distribution matching.

    batches: the parts of the states that it is a loss of; None: distribution matching's own. balance: weighs and clips
    its gradient apart; None: one gradient of both losses, clipped together. trust: the weight is multiplied by it.
    """

    loss: RLLoss
    weight: float
    batches: list[Batch] | None = None
    balance: Balance | None = None
    trust: float | torch.Tensor = 1.0

    @property
    def trusted_weight(self) -> float | torch.Tensor:
        return self.weight * self.trust


@dataclass(frozen=True)
class GuidanceLevels:
    """Where the CFG of a decoupled real score is taken: noise (B, C, H, W), and levels of which share (B,) says how far
    each lies between the two ends of `span`, from 0 to 1.

    below: the upper end is the state's own time, where it is the lower one ("below" of the config).
    """

    share: torch.Tensor
    noise: torch.Tensor
    span: tuple[float, float]
    below: bool

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """t and noise of a part's states, on their device."""
        low, high = (torch.full_like(batch.t, end) for end in self.span)
        if self.below:
            high = torch.minimum(high, batch.t)
            low = torch.minimum(low, high)  # a state below the span has CFG at its own time
        t = low + send(self.share[batch.rows], high) * (high - low)
        return t.to(batch.x0), send(self.noise[batch.rows], batch.x0)


@dataclass(frozen=True)
class Levels:
    """Where the two scores of this rank's part of a batch are compared: renoise levels t (B,), noise (B, C, H, W).

    cfg: where the CFG of the real score is taken; None: there too.
    """

    t: torch.Tensor
    noise: torch.Tensor
    cfg: GuidanceLevels | None = None

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """t and noise of a part's states, on their device."""
        return send(self.t[batch.rows], batch.x0), send(self.noise[batch.rows], batch.x0)


@dataclass(frozen=True)
class SampleWeights:
    """What this rank's part of a batch is multiplied by: values (B,). part: all of the gradient, or the CFG in it."""

    values: torch.Tensor
    part: Literal["all", "guidance"]

    def select(self, batch: Batch, part: Literal["all", "guidance"]) -> torch.Tensor | None:
        """Those of a part's states; None where they multiply something else."""
        return self.values[batch.rows] if part == self.part else None


@dataclass(frozen=True)
class RealScore:
    """How the real score is taken: the base with the fake score's LoRA at `lora_scale` (DynaDG), under CFG.

    guidance_scale: of all samples, or (B, 1, 1, 1). floor: of the mean |x0 - x0_real| that the difference of the scores
    is divided by.
    """

    unconditional: Conditioning
    guidance_scale: float | torch.Tensor
    lora_scale: float
    floor: float = 0.0

    def weigh_guidance(self, weights_B: torch.Tensor | None, like: torch.Tensor) -> RealScore:
        """What CFG adds to the score with the prompt, times a weight for each sample; 1 changes no bit.

        like: the samples (B, C, H, W).
        """
        if weights_B is None:
            return self
        scale = (self.guidance_scale - 1) * (per_sample(weights_B, like) - 1) + self.guidance_scale
        return replace(self, guidance_scale=scale)


def roll_out(
    base: SharedBase, c: Conditioning, *, times: torch.Tensor, noises: torch.Tensor, eta: float = 1.0
) -> States:
    """Backward simulation of the current student: N states of each trajectory of `noises` (N, M, C, H, W)."""
    return simulate_backward(lambda x_t, t: base.student(x_t, t, c), base.backbone, times=times, noises=noises, eta=eta)


def select_states(
    states: States,
    c: Conditioning,
    pairs: torch.Tensor,
    *,
    block: int = 1,
    most: int | None = None,
    first: int = 0,
    of: int | None = None,
) -> list[Batch]:
    """The states that `pairs` names, this rank's of a batch, in whole blocks, cut into parts.

    Args:
        pairs: flat indices into this rank's (N steps x M trajectories).
        block: neighbours in `pairs` that stay together.
        most: the most states of a part, None for one part. Every rank has equally many parts.
        first: the number of the first of `pairs` among all that this rank has, where they are a part of them.
        of: the states of the batch on all ranks; None: `pairs` are all.
    """
    count, of = states.x0.shape[1], len(pairs) if of is None else of
    most_blocks = None if most is None else max(1, most // block)
    batches = []
    for part in distributed.split_batches(slice(0, len(pairs) // block), of // block, most_blocks):
        rows = slice(part.start * block, part.stop * block)
        step, trajectory = pairs[rows] // count, pairs[rows] % count
        here = send_to(torch.stack([step, trajectory]), states.x0.device)
        c_part = {key: value[trajectory if value.device == pairs.device else here[1]] for key, value in c.items()}
        x_t, x0 = states.x_t[here[0], here[1]], states.x0[here[0], here[1]]
        rows = slice(first + rows.start, first + rows.stop)
        batches.append(Batch(x_t, x0, states.times[here[0]], c_part, step, trajectory, rows, of))
    return batches


def update_fake_score(
    base: SharedBase, batches: list[Batch], levels: Levels, fake_score: Trainable
) -> dict[str, torch.Tensor]:
    """One step of L_diff on the student's samples; the parts of a batch run one after another."""
    path, figures = base.backbone.path, FigureSums()
    fake_score.zero_grad()
    for batch in batches:
        t, noise = levels.of(batch)
        prediction = base.fake(path.renoise(batch.x0, noise, t), t, batch.c)
        loss = losses.fake_score(prediction, path.target(batch.x0, noise, t)) * batch.share
        loss.backward()
        figures.add({"loss_fake": loss})
    grad_fake = fake_score.step()
    return {**figures.of_all_ranks(), "grad_fake": grad_fake}


@torch.no_grad()
def measure_teacher_loss(base: SharedBase, batches: list[Batch], levels: Levels) -> dict[str, torch.Tensor]:
    """L_diff of the bare teacher on the samples and levels that the fake score trains on: how far the two are apart."""
    path, figures = base.backbone.path, FigureSums()
    for batch in batches:
        t, noise = levels.of(batch)
        with base.use_adapter(FAKE, 0.0) as network:
            prediction = base.backbone.predict(network, path.renoise(batch.x0, noise, t), t, batch.c)
        figures.add({"loss_teacher": losses.fake_score(prediction, path.target(batch.x0, noise, t)) * batch.share})
    return figures.of_all_ranks()


def update_student(
    base: SharedBase,
    batches: list[Batch],
    levels: Levels,
    real_score: RealScore,
    *,
    student: Trainable,
    fake_score: Trainable,
    rl: WeightedLoss | SampleWeights | None = None,
) -> dict[str, torch.Tensor]:
    """L = L_dmd + weight L_rl (DMDR, equation 2) for the student, and the last step of the fake score.

    The parts of a batch run one after another; the figures are those of the batch of all ranks.
    rl: its loss, or the weights of the samples in L_dmd; None for distillation only.
    """
    path, figures = base.backbone.path, FigureSums()
    weights, rl = (rl, None) if isinstance(rl, SampleWeights) else (None, rl)
    gradients_rl = GradientSum(list(student.parameters.values()))
    student.zero_grad()
    fake_score.zero_grad()
    for batch in batches:
        x0 = base.student(batch.x_t, batch.t, batch.c)
        t, noise = levels.of(batch)
        sample = x0.detach()

        x_t = path.renoise(sample, noise, t)
        of_gradient = None if weights is None else weights.select(batch, "all")
        of_guidance = None if weights is None else weights.select(batch, "guidance")
        guided = real_score.weigh_guidance(of_guidance, sample)
        x0_real = estimate_real_x0(base, batch, sample, (x_t, t), levels.cfg, guided)
        prediction = base.fake(x_t, t, batch.c)
        x0_fake = path.to_x0(x_t, prediction.detach(), t)
        loss_fake = losses.fake_score(prediction, path.target(sample, noise, t)) * batch.share
        loss_fake.backward()

        loss_dm = losses.distribution_matching(x0, x0_real, x0_fake, real_score.floor, of_gradient) * batch.share
        loss = loss_dm
        figures.add({"loss_dm": loss_dm, "loss_fake": loss_fake, "renoise_mean": t.mean() * batch.share})
        towards_rl = None
        if rl is not None and rl.batches is None:
            loss_rl, rl_figures = rl.loss(x0, batch)
            figures.add({"loss_rl": loss_rl, **rl_figures})
            if rl.balance is None:
                loss = loss_dm + rl.trusted_weight * loss_rl
            else:  # first down to x0, which frees reward and decoder; only the student's graph serves both
                (towards_rl,) = torch.autograd.grad(loss_rl, x0)
        if towards_rl is not None:
            gradients_rl.add((x0 * towards_rl).sum(), keep_graph=True)
        loss.backward()
    if rl is not None and rl.batches is not None:
        add_rl(base, rl, rl.batches, gradients_rl, figures)
    grad_fake = fake_score.step()
    if rl is None or rl.balance is None:
        weight = {} if rl is None else {"rl_weight": torch.as_tensor(rl.trusted_weight)}
        norms = weight | {"grad_student": student.step()}
    else:
        norms = student.step_beside(gradients_rl, rl.balance, rl.trust)
    return {**figures.of_all_ranks(), **norms, "grad_fake": grad_fake}


def estimate_real_x0(
    base: SharedBase,
    batch: Batch,
    sample: torch.Tensor,
    matched: tuple[torch.Tensor, torch.Tensor],
    cfg: GuidanceLevels | None,
    real_score: RealScore,
) -> torch.Tensor:
    """The real score as x0, in the coupled or the decoupled form.

    sample: the student's x0. matched: x_t and t where the two scores are compared.
    """
    c, scale, lora_scale = batch.c, real_score.guidance_scale, real_score.lora_scale
    unconditional = real_score.unconditional
    if cfg is None:
        return base.real_x0(*matched, c, unconditional, guidance_scale=scale, lora_scale=lora_scale)
    t, noise = cfg.of(batch)
    guided = base.backbone.path.renoise(sample, noise, t), t
    return base.decoupled_real_x0(matched, guided, c, unconditional, guidance_scale=scale, lora_scale=lora_scale)


def add_rl(
    base: SharedBase, rl: WeightedLoss, batches: list[Batch], gradients: GradientSum, figures: FigureSums
) -> None:
    """Run the student on RL's states, and add the gradient of the RL loss, before its weight, to `gradients`."""
    for batch in batches:
        loss_rl, rl_figures = rl.loss(base.student(batch.x_t, batch.t, batch.c), batch)
        figures.add({"loss_rl": loss_rl, **rl_figures})
        gradients.add(loss_rl)


def update_student_by_rl(
    base: SharedBase, batches: list[Batch], student: Trainable, rl: WeightedLoss
) -> dict[str, torch.Tensor]:
    """L = weight L_rl: a row of Table 5 that shows what distribution matching adds. No score runs.

    batches: the states of an RL loss that has none of its own.
    """
    figures = FigureSums()
    student.zero_grad()
    for batch in rl.batches or batches:
        loss_rl, rl_figures = rl.loss(base.student(batch.x_t, batch.t, batch.c), batch)
        figures.add({"loss_rl": loss_rl, **rl_figures})
        (rl.trusted_weight * loss_rl).backward()
    grad_student = student.step()
    return {**figures.of_all_ranks(), "grad_student": grad_student}


class FigureSums:
    """Sums figures over the parts of a batch; each part gives its share of the whole batch's figure."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def add(self, part: dict[str, torch.Tensor]) -> None:
        for name, value in part.items():
            total = self.values.get(name)
            self.values[name] = value.detach() if total is None else total + value.detach()

    def of_all_ranks(self) -> dict[str, torch.Tensor]:
        """Sums over parts and ranks. reward_square/NAME, a mean square, becomes the deviation reward_std/NAME."""
        sums = distributed.all_reduce_sums(self.values)
        for name in [name for name in sums if name.startswith("reward_square/")]:
            reward = name.removeprefix("reward_square/")
            variance = sums.pop(name) - sums[f"reward/{reward}"].square()
            sums[f"reward_std/{reward}"] = variance.clamp(min=0).sqrt()
        return sums
