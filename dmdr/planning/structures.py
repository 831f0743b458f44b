"""One student update as four code bases build it, over one SharedBase and on stand-in data: what `bench.py` measures.

Written from what their code does, not taken from it. Networks, losses, optimizers and LoRA (PEFT's) are the same for
all, so that they differ in which calls they make, and in these points from what they are named for:
1. Reward, decoder and text encoders are left out of all four, and DMD2's GAN with them.
2. DMD2 and FastVideo train a full copy of the teacher as the fake score: `fake_rank=None`. A rank is ours and official.
3. The official demo multiplies the two matrices of each LoRA in every call; PEFT does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from dmdr import losses
from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.optimizers import Trainable
from dmdr.shared_base import FAKE, STUDENT, SharedBase
from dmdr.update import (
    Levels,
    RealScore,
    count_trajectories,
    roll_out,
    select_states,
    update_fake_score,
    update_student,
)

GUIDANCE = 7.0


class FullFakeScore(SharedBase):
    """The fake score as a full copy of the teacher, as DMD2 and FastVideo have it; the base keeps a LoRA, unused."""

    def __init__(self, backbone: Backbone, *, student_rank: int | None, seed: int) -> None:
        self.fake_network = copy.deepcopy(backbone.network).requires_grad_(True)
        super().__init__(backbone, fake_rank=1, fake_scale=1.0, student_rank=student_rank, seed=seed)
        self.fake_parameters = dict(self.fake_network.named_parameters())

    def fake(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        return self.backbone.predict(self.fake_network, x_t, t, c)


class Case:
    """One network with K, N and the batch B at which its update is measured, and stand-in data for it.

    Args:
        context, pooled: shapes of one prompt's conditioning.
        steps, k: N, K.
        fake_rank, student_rank: of their LoRAs; None is a full copy.
    """

    def __init__(
        self,
        backbone: Backbone,
        context: tuple[int, int],
        pooled: int,
        *,
        batch: int,
        steps: int,
        k: int,
        fake_rank: int | None,
        student_rank: int | None,
    ) -> None:
        self.like = next(backbone.network.parameters())
        with torch.device(self.like.device):
            self.base = (
                FullFakeScore(backbone, student_rank=student_rank, seed=0)
                if fake_rank is None
                else SharedBase(backbone, fake_rank=fake_rank, fake_scale=2.0, student_rank=student_rank, seed=0)
            )
        self.batch, self.steps, self.k = batch, steps, k
        self.context, self.pooled = context, pooled
        still = {"lr": 0.0, "foreach": False}
        self.optimizers = (
            torch.optim.SGD(self.base.student_parameters.values(), **still),
            torch.optim.SGD(self.base.fake_parameters.values(), **still),
        )
        self.times = torch.linspace(1, 0, steps + 1).to(self.like)

    def conditioning(self, count: int) -> Conditioning:
        return {"context": self.like.new_zeros(count, *self.context), "pooled": self.like.new_zeros(count, self.pooled)}

    def latents(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, *self.base.backbone.latent_shape, device=self.like.device)

    def renoise(self) -> Levels:
        return Levels(torch.rand(self.batch, device=self.like.device), self.latents(self.batch))

    def forward(self) -> None:
        """F itself: the bare base."""
        c, t = self.conditioning(self.batch), self.renoise().t
        with torch.no_grad(), self.base.use_adapter(FAKE, 0.0) as network:
            self.base.backbone.predict(network, self.latents(self.batch), t, c)


def run_ours(case: Case) -> None:
    """dmdr.train: one rollout a window, every state of it used; the student's step and a fake step share a forward."""
    base, count = case.base, count_trajectories(case.batch, case.k, case.steps)
    c = case.conditioning(count)
    states = roll_out(base, c, case.times, case.latents(case.steps, count))
    student = Trainable(base.student_parameters, case.optimizers[0], clip=1.0)
    fake_score = Trainable(base.fake_parameters, case.optimizers[1], clip=1.0)
    for part in range(case.k):
        pairs = (torch.arange(case.batch) + part * case.batch) % (count * case.steps)
        chosen = select_states(states, c, pairs)
        if part < case.k - 1:
            update_fake_score(base, chosen, case.renoise(), fake_score)
    real_score = RealScore(case.conditioning(1), GUIDANCE, lora_scale=0.5)
    update_student(base, chosen, case.renoise(), real_score, student=student, fake_score=fake_score)


def run_official(case: Case) -> None:
    """Official DMDR (vvvvvjdy/dmdr, train_cc/sit): K rollouts of N steps, a fake step after each, one student step.

    A sample's x0 at a drawn step is what the fake score learns. Renoised to the time that it was predicted at, it is
    also the student's input: one prediction ahead of the sampler's.
    """
    base, c = case.base, case.conditioning(case.batch)
    for _ in range(case.k):
        states = roll_out(base, c, case.times, case.latents(case.steps, case.batch))
        pairs = torch.randint(case.steps, (case.batch,)) * case.batch + torch.arange(case.batch)
        (chosen,) = select_states(states, c, pairs)
        _fake_step(case, chosen.x0, c)
    x_t = base.backbone.path.renoise(chosen.x0, case.latents(case.batch), chosen.t)
    _student_step(case, x_t, chosen.t, c, partial(_real, case, c, lora_scale=0.5))


def run_dmd2(case: Case, left: int) -> None:
    """DMD2 (tianweiy/DMD2, main/train_sd.py), no GAN: K rollouts to a random step, the student there, a fake step.

    One in K is with a gradient and descends before that fake step, which learns the same x0. All rollouts of this
    update leave at step `left`, so that the mean over 0 .. N - 1 is the expectation.
    """
    c, t = case.conditioning(case.batch), case.times[left].expand(case.batch)
    for part in range(case.k):
        x_t = _inputs(case, c, forwards=left)[left]
        if part == 0:
            x0 = _student_step(case, x_t, t, c, partial(_real, case, c, lora_scale=0.0))
        else:
            x0 = _predicted(case, x_t, t, c)
        _fake_step(case, x0, c)


def run_fastvideo(case: Case) -> None:
    """FastVideo (hao-ai-lab/FastVideo, fastvideo/train): K rollouts of N - 1 steps, then a drawn step, a fake step.

    The student's step has one rollout more, and real with and without the prompt are two calls.
    """
    c = case.conditioning(case.batch)

    def drawn() -> tuple[torch.Tensor, torch.Tensor]:  # whichever step it is, all N - 1 forwards were run
        step = int(torch.randint(case.steps, ()))
        return _inputs(case, c, forwards=case.steps - 1)[step], case.times[step].expand(case.batch)

    for part in range(case.k):
        if part == 0:
            _student_step(case, *drawn(), c, partial(_real_in_two, case, c))
        _fake_step(case, _predicted(case, *drawn(), c), c)


STRUCTURES = {"ours": run_ours, "official": run_official, "dmd2": run_dmd2, "fastvideo": run_fastvideo}


def build_updates(case: Case, name: str) -> list[Callable[[], None]]:
    """The equally likely forms of one student update; more than one where its cost is drawn."""
    if name == "dmd2":
        return [partial(run_dmd2, case, left) for left in range(case.steps)]
    return [partial(STRUCTURES[name], case)]


@torch.no_grad()
def _predicted(case: Case, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
    return case.base.student(x_t, t, c)


def _inputs(case: Case, c: Conditioning, *, forwards: int) -> list[torch.Tensor]:
    """What the sampler sees at steps 0 .. forwards: noise, then what one forward of the student more leads to."""
    inputs = [case.latents(case.batch)]
    for t, t_next in pairwise(case.times[: forwards + 1]):
        x0 = _predicted(case, inputs[-1], t.expand(case.batch), c)
        inputs.append(case.base.backbone.path.renoise(x0, case.latents(case.batch), t_next.expand(case.batch)))
    return inputs


def _real(case: Case, c: Conditioning, x_t: torch.Tensor, t: torch.Tensor, *, lora_scale: float) -> torch.Tensor:
    """x0 with CFG, with and without the prompt in one call of 2 B."""
    return case.base.real_x0(x_t, t, c, case.conditioning(1), guidance_scale=GUIDANCE, lora_scale=lora_scale)


def _real_in_two(case: Case, c: Conditioning, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same in two calls of B."""
    empty = case.conditioning(case.batch)
    with_prompt, without = (
        case.base.real_x0(x_t, t, each, empty, guidance_scale=1.0, lora_scale=0.0) for each in (c, empty)
    )
    return without + GUIDANCE * (with_prompt - without)


def _student_step(
    case: Case,
    x_t: torch.Tensor,
    t: torch.Tensor,
    c: Conditioning,
    real: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Distribution matching as all three do it, the fake score once and without a graph; returns x0."""
    base, path, renoise = case.base, case.base.backbone.path, case.renoise()
    x0 = base.student(x_t, t, c)
    sample = path.renoise(x0.detach(), renoise.noise, renoise.t)
    with torch.no_grad():
        x0_fake = path.to_x0(sample, base.fake(sample, renoise.t, c), renoise.t)
    loss = losses.distribution_matching(x0, real(sample, renoise.t), x0_fake)
    with base.use_adapter(STUDENT, float(base.student_is_lora)):
        _descend(loss, base.student_parameters, case.optimizers[0])
    return x0.detach()


def _fake_step(case: Case, x0: torch.Tensor, c: Conditioning) -> None:
    base, path, renoise = case.base, case.base.backbone.path, case.renoise()
    prediction = base.fake(path.renoise(x0, renoise.noise, renoise.t), renoise.t, c)
    loss = losses.fake_score(prediction, path.target(x0, renoise.noise))
    _descend(loss, base.fake_parameters, case.optimizers[1])


def _descend(loss: torch.Tensor, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
