"""The update at the cost floor has the gradients of the naive loop."""

from __future__ import annotations

import pytest
import torch

from dmdr.config.batches import count_trajectories
from dmdr.config.few_steps import FewSteps
from dmdr.noise import noise_for
from dmdr.optimizers import Trainable
from dmdr.shared_base import SharedBase
from dmdr.update import (
    Levels,
    RealScore,
    roll_out,
    select_states,
    update_fake_score,
    update_student,
)
from tests.support import naive
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two squares", "a cross left of a circle", "a view of three triangles"]


def shared_base(folder, rank: int | None, dtype=torch.float64) -> SharedBase:
    backbone = copy_teacher(folder)
    backbone.network.to(dtype)
    base = SharedBase(backbone, fake_rank=4, fake_scale=2.0, student_rank=rank, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B = 0 would hide the LoRA's scale and half of its gradient
        for parameter in [*base.fake_parameters.values(), *(base.student_parameters.values() if rank else ())]:
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.05)
    return base


class Still(torch.optim.Optimizer):
    """Takes no step, so that the gradients of an update stay to be read."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        pass


def gradients(parameters: dict) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 1e-5, "gradients too small to tell"
    for name in ours:
        assert float((ours[name] - theirs[name]).abs().max()) < 1e-5 * largest, (
            name
        )  # the asked tolerance; alpha_bar is float32


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize(("real_scale", "most", "eta"), [(0.0, None, 1), (0.6, None, 0), (0.6, 3, 1)])
def test_gradients_equal_the_naive_loop(tiny_folder, rank, real_scale, most, eta):
    """Of one batch, and of one that is run in two parts; of a student that renoises, and of one that follows an ODE."""
    base = shared_base(tiny_folder, rank)
    backbone, steps, count, batch_size = base.backbone, 4, 3, 4
    c = backbone.collate(backbone.encode(PROMPTS[:count])[0])
    unconditional = backbone.collate(backbone.encode([""])[0])
    times = backbone.student_times(FewSteps(steps)).double()
    noises = noise_for(7, "rollout", shape=(steps, count, *backbone.latent_shape)).double()
    pairs = torch.tensor([0, 5, 7, 11])
    renoise = Levels(
        torch.tensor([0.2, 0.5, 0.7, 0.95]).double(),
        noise_for(8, "renoise", shape=(batch_size, *backbone.latent_shape)).double(),
    )
    batches = select_states(roll_out(base, c, times=times, noises=noises, eta=eta), c, pairs, most=most)
    optimizers = Still(base.student_parameters.values()), Still(base.fake_parameters.values())

    student = Trainable(base.student_parameters, optimizers[0], clip=1e9)
    fake_score = Trainable(base.fake_parameters, optimizers[1], clip=1e9)
    update_fake_score(base, batches, renoise, fake_score)
    ours_fake = gradients(base.fake_parameters)
    real_score = RealScore(unconditional, guidance_scale=3.0, lora_scale=real_scale)
    update_student(base, batches, renoise, real_score, student=student, fake_score=fake_score)
    ours_fused, ours_student = gradients(base.fake_parameters), gradients(base.student_parameters)

    states = [naive.simulate(base, c, times, noises, int(pair), eta) for pair in pairs]
    for parameter in [*base.fake_parameters.values(), *base.student_parameters.values()]:
        parameter.requires_grad_(True).grad = None
    fakes = list(base.fake_parameters.values())
    loss = naive.fake_loss(base, states, renoise)
    theirs_fake = dict(zip(base.fake_parameters, torch.autograd.grad(loss, fakes, allow_unused=True), strict=True))
    loss = naive.student_loss(base, states, renoise, unconditional, guidance_scale=3.0, scale=real_scale)
    for parameter in base.student_parameters.values():
        parameter.requires_grad_(True)
    students = list(base.student_parameters.values())
    found = torch.autograd.grad(loss, students, allow_unused=True)
    theirs_student = dict(zip(base.student_parameters, found, strict=True))

    used = {name: g for name, g in theirs_fake.items() if g is not None}
    assert_close(ours_fake, used)
    assert_close(ours_fused, used)
    assert_close(ours_student, {name: g for name, g in theirs_student.items() if g is not None})


@pytest.mark.parametrize(("k", "steps"), [(5, 1), (5, 2), (5, 4), (5, 8), (1, 4), (2, 8), (6, 4)])
def test_a_window_has_states_enough(k, steps):
    for batch_size in (1, 3, 32):
        have = count_trajectories(batch_size, k, steps) * steps
        assert have >= batch_size * max(k - 1, 1)
        assert have - steps < batch_size * max(k - 1, 1), "a trajectory too many"


def test_scale_zero_is_the_untouched_teacher(tiny_sd3_folder):
    base, bare = shared_base(tiny_sd3_folder, None, torch.float32), copy_teacher(tiny_sd3_folder)
    backbone = base.backbone
    c, empty = (backbone.collate(backbone.encode(texts)[0]) for texts in (PROMPTS, [""]))
    x_t = noise_for(1, "x", shape=(4, *backbone.latent_shape))
    t = torch.tensor([0.1, 0.4, 0.8, 1.0])
    real = base.real_x0(x_t, t, c, empty, guidance_scale=1.0, lora_scale=0.0)
    assert torch.equal(real, bare.predict_x0(bare.network, x_t, t, c))
    assert not torch.equal(real, base.real_x0(x_t, t, c, empty, guidance_scale=1.0, lora_scale=0.5))
