"""One student update as four code bases build it, on stand-in data. `bench.py` counts and times them.

We wrote these structures after reading the code; nothing is copied. Networks, losses, optimizers and LoRA (ours) are
the same in all four, so that the structures differ only in the calls that they make. They depart from the code that
they are named for:
1. None of the four contains a reward, a decoder or text encoders, and `dmd2` has no GAN.
2. DMD2 and FastVideo train a full copy of the teacher as the fake score: `fake_rank=None` measures that. With a rank,
   the fake score is a LoRA, as in our code and in the official demo.
3. The official demo multiplies the two matrices of each LoRA in every call. Ours does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from dmdr import losses
from dmdr.backbones.protocol import Backbone, Conditioning, Item
from dmdr.config.batches import count_trajectories
from dmdr.optimizers import Trainable
from dmdr.shared_base import FAKE, SharedBase
from dmdr.update import (
    Levels,
    RealScore,
    roll_out,
    select_states,
    update_fake_score,
    update_student,
)

GUIDANCE = 7.0


class FullFakeScore(SharedBase):
    """A fake score that is a full copy of the teacher, as in DMD2 and FastVideo. The base's own LoRA stays unused."""

    def __init__(self, backbone: Backbone, *, student_rank: int | None, seed: int) -> None:
        self.fake_network = copy.deepcopy(backbone.network).requires_grad_(True)
        super().__init__(
            backbone, fake_rank=1, fake_scale=1.0, student_rank=student_rank, seed=seed, compute=backbone.compute
        )
        self.fake_parameters = dict(self.fake_network.named_parameters())

    def fake(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        return self.backbone.predict(self.fake_network, x_t, t, c)


class Case:
    """A network, the settings at which one update of it is measured, and stand-in data for that update.

    Args:
        prompt: one prompt's conditioning, of which only the shapes matter.
        batch: B, images in a batch.
        steps: N, steps of the student.
        k: K, fake-score updates for each student update.
        fake_rank, student_rank: ranks of their LoRAs. None: a full copy of the teacher.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: Item,
        *,
        batch: int,
        steps: int,
        k: int,
        fake_rank: int | None,
        student_rank: int | None,
    ) -> None:
        self.weight = next(backbone.network.parameters())  # data follow its device and dtype
        with torch.device(self.weight.device):
            self.base = (
                FullFakeScore(backbone, student_rank=student_rank, seed=0)
                if fake_rank is None
                else SharedBase(
                    backbone,
                    fake_rank=fake_rank,
                    fake_scale=2.0,
                    student_rank=student_rank,
                    seed=0,
                    compute=backbone.compute,
                )
            )
        self.prompt, self.batch, self.steps, self.k = prompt, batch, steps, k
        self.student_optimizer = torch.optim.SGD(self.base.student_parameters.values(), lr=0.0, foreach=False)
        self.fake_optimizer = torch.optim.SGD(self.base.fake_parameters.values(), lr=0.0, foreach=False)
        self.times = torch.linspace(1, 0, steps + 1).to(self.weight.device)

    def build_conditioning(self, count: int) -> Conditioning:
        """Zeros in the shape of the conditioning of `count` prompts."""
        context, pooled = self.prompt["context"], self.prompt["pooled"]
        return {
            "context": self.weight.new_zeros(count, *context.shape),
            "pooled": self.weight.new_zeros(count, *pooled.shape[1:]),
        }

    def draw_latents(self, *shape: int) -> torch.Tensor:
        """Noise (*shape, C, H, W)."""
        return torch.randn(*shape, *self.base.backbone.latent_shape, device=self.weight.device)

    def draw_levels(self) -> Levels:
        """A renoise level and noise for each image of a batch."""
        return Levels(torch.rand(self.batch, device=self.weight.device), self.draw_latents(self.batch))

    def run_forward(self) -> None:
        """F, the unit of work: one forward of the bare base on one batch, without gradients."""
        c, t = self.build_conditioning(self.batch), self.draw_levels().t
        with torch.no_grad(), self.base.use_adapter(FAKE, 0.0) as network:
            self.base.backbone.predict(network, self.draw_latents(self.batch), t, c)


def run_ours(case: Case) -> None:
    """dmdr.train: one rollout serves all K batches; the student's update and the K-th fake update share a forward."""
    base, count = case.base, count_trajectories(case.batch, case.k, case.steps)
    c = case.build_conditioning(count)
    states = roll_out(base, c, times=case.times, noises=case.draw_latents(case.steps, count))
    student = Trainable(base.student_parameters, case.student_optimizer, clip=1.0)
    fake_score = Trainable(base.fake_parameters, case.fake_optimizer, clip=1.0)
    pairs = (torch.arange(case.k * case.batch) % (count * case.steps)).view(case.k, case.batch)
    for row in pairs[:-1]:
        update_fake_score(base, select_states(states, c, row), case.draw_levels(), fake_score)
    batch = select_states(states, c, pairs[-1])
    real_score = RealScore(case.build_conditioning(1), GUIDANCE, lora_scale=0.5)
    update_student(base, batch, case.draw_levels(), real_score, student=student, fake_score=fake_score)


def run_official(case: Case) -> None:
    """Official DMDR (vvvvvjdy/dmdr, train_cc/sit): K rollouts of N steps, a fake step after each, one student step.

    The fake score learns from the x0 of one random step of each sample. The student's input is the last of these x0,
    renoised to the time at which it was predicted. The sampler would have renoised the previous step's x0 to that time.
    """
    base, c = case.base, case.build_conditioning(case.batch)
    for _ in range(case.k):
        states = roll_out(base, c, times=case.times, noises=case.draw_latents(case.steps, case.batch))
        pairs = torch.randint(case.steps, (case.batch,)) * case.batch + torch.arange(case.batch)
        (batch,) = select_states(states, c, pairs)
        _update_fake_score(case, batch.x0, c)
    x_t = base.backbone.path.renoise(batch.x0, case.draw_latents(case.batch), batch.t)
    _update_student(case, x_t, batch.t, c, partial(_predict_real, case, c, lora_scale=0.5))


def run_dmd2(case: Case, last: int) -> None:
    """DMD2 (tianweiy/DMD2, main/train_sd.py), no GAN: K rollouts to a random step, the student there, a fake step.

    One of the K predictions has a gradient and updates the student. The fake score then learns from the same x0. All
    rollouts of this update end at step `last`, so the mean over 0 .. N - 1 is the expected cost.
    """
    c, t = case.build_conditioning(case.batch), case.times[last].expand(case.batch)
    for rollout in range(case.k):
        x_t = _roll_out_inputs(case, c, forwards=last)[last]
        if rollout == 0:
            x0 = _update_student(case, x_t, t, c, partial(_predict_real, case, c, lora_scale=0.0))
        else:
            x0 = _predict_student(case, x_t, t, c)
        _update_fake_score(case, x0, c)


def run_fastvideo(case: Case) -> None:
    """FastVideo (hao-ai-lab/FastVideo, fastvideo/train): K rollouts of N - 1 steps, then a drawn step, a fake step.

    The student's update has a rollout of its own. Real with the prompt and without it are two calls.
    """
    c = case.build_conditioning(case.batch)

    def draw_input() -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and t of a random step. All N - 1 forwards run, whichever step it is."""
        step = int(torch.randint(case.steps, ()))
        x_t = _roll_out_inputs(case, c, forwards=case.steps - 1)[step]
        return x_t, case.times[step].expand(case.batch)

    for rollout in range(case.k):
        if rollout == 0:
            x_t, t = draw_input()
            _update_student(case, x_t, t, c, partial(_predict_real_in_two_calls, case, c))
        x_t, t = draw_input()
        _update_fake_score(case, _predict_student(case, x_t, t, c), c)


STRUCTURES: dict[str, Callable[..., None]] = {
    "ours": run_ours,
    "official": run_official,
    "dmd2": run_dmd2,
    "fastvideo": run_fastvideo,
}


def build_updates(case: Case, name: str) -> list[Callable[[], None]]:
    """One student update of a structure, in all its forms that differ in cost. All forms are equally likely."""
    if name == "dmd2":
        return [partial(run_dmd2, case, last) for last in range(case.steps)]
    return [partial(STRUCTURES[name], case)]


@torch.no_grad()
def _predict_student(case: Case, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
    """The student's x0, without gradients."""
    return case.base.student(x_t, t, c)


def _roll_out_inputs(case: Case, c: Conditioning, *, forwards: int) -> list[torch.Tensor]:
    """The student's inputs x_t at steps 0 .. forwards: noise, then the renoised x0 of the step before."""
    inputs = [case.draw_latents(case.batch)]
    for t, t_next in pairwise(case.times[: forwards + 1]):
        x0 = _predict_student(case, inputs[-1], t.expand(case.batch), c)
        inputs.append(case.base.backbone.path.renoise(x0, case.draw_latents(case.batch), t_next.expand(case.batch)))
    return inputs


def _predict_real(
    case: Case, c: Conditioning, x_t: torch.Tensor, t: torch.Tensor, *, lora_scale: float
) -> torch.Tensor:
    """The real score's x0 with CFG: one call of 2 B, with the prompt and without it."""
    empty = case.build_conditioning(1)
    return case.base.real_x0(x_t, t, c, empty, guidance_scale=GUIDANCE, lora_scale=lora_scale)


def _predict_real_in_two_calls(case: Case, c: Conditioning, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The real score's x0 with CFG: two calls of B."""
    empty = case.build_conditioning(case.batch)
    with_prompt = case.base.real_x0(x_t, t, c, empty, guidance_scale=1.0, lora_scale=0.0)
    without = case.base.real_x0(x_t, t, empty, empty, guidance_scale=1.0, lora_scale=0.0)
    return without + GUIDANCE * (with_prompt - without)


def _update_student(
    case: Case,
    x_t: torch.Tensor,
    t: torch.Tensor,
    c: Conditioning,
    predict_real: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Update the student by distribution matching as all three do it, and return its x0.

    The fake score runs once for it, without gradients.
    """
    base, path, levels = case.base, case.base.backbone.path, case.draw_levels()
    x0 = base.student(x_t, t, c)
    sample = path.renoise(x0.detach(), levels.noise, levels.t)
    with torch.no_grad():
        x0_fake = path.to_x0(sample, base.fake(sample, levels.t, c), levels.t)
    loss = losses.distribution_matching(x0, predict_real(sample, levels.t), x0_fake)
    _descend(loss, base.student_parameters, case.student_optimizer)
    return x0.detach()


def _update_fake_score(case: Case, x0: torch.Tensor, c: Conditioning) -> None:
    """Update the fake score by its denoising loss on x0."""
    base, path, levels = case.base, case.base.backbone.path, case.draw_levels()
    prediction = base.fake(path.renoise(x0, levels.noise, levels.t), levels.t, c)
    loss = losses.fake_score(prediction, path.target(x0, levels.noise, levels.t))
    _descend(loss, base.fake_parameters, case.fake_optimizer)


def _descend(loss: torch.Tensor, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
