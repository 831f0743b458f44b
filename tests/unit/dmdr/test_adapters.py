"""Our LoRA beside PEFT's: the same initial values, numbers, gradients and names; files go both ways."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from dmdr.config.few_steps import FewSteps
from dmdr.config.lora import LoraForm, LoraForms
from dmdr.config.training import Optimizer, Training
from dmdr.noise import noise_for
from dmdr.shared_base import FAKE, STUDENT, SharedBase
from dmdr.state import TrainState
from dmdr.update import Levels, RealScore, WeightedLoss, roll_out, select_states, update_fake_score, update_student
from tests.support.peft_base import PeftBase
from tests.support.tiny_teachers import copy_teacher

FAMILIES = ("sd3", "sdxl", "z_image", "flux")
PROMPTS = ["a red circle", "two squares"]
WIDE = LoraForms(LoraForm("wide"), LoraForm("wide", "gaussian", alpha=10.0))


def make_base(folder, kind: type[SharedBase] = SharedBase, *, rank: int | None = 4, lora=WIDE) -> SharedBase:
    return kind(copy_teacher(folder, 16), fake_rank=2, fake_scale=2.0, student_rank=rank, seed=3, lora=lora)


def move(base: SharedBase, seed: int = 5) -> None:
    """Random LoRAs, none of them 0, in double precision, with the networks."""
    generator = torch.Generator().manual_seed(seed)
    for network in (base.backbone.network, base.student_network):
        network.double()
    with torch.no_grad():
        for parameters in (base.fake_parameters, base.student_parameters):
            for name, parameter in parameters.items():
                if ".lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())


def update(base: SharedBase, *, part: int | None = None, recompute: bool = False, steps: int = 1) -> TrainState:
    """Updates of both networks with an RL loss beside, in double precision; the gradients of the last remain."""
    if recompute:
        base.recompute_activations("all")
    backbone = base.backbone
    empty = {k: v.double() if v.is_floating_point() else v for k, v in give_prompts(base, [""]).items()}
    c = give_prompts(base, PROMPTS)
    rate = Optimizer(learning_rate=1e-3, weight_decay=0.0)
    state = TrainState(base, Training(updates=9, batch_size=4, student=rate, fake_score=rate), ema=0.9)
    for number in range(steps):
        noises = noise_for(number, "rollout", shape=(2, 2, *backbone.latent_shape)).double()
        states = roll_out(base, c, times=backbone.student_times(FewSteps(2)).double(), noises=noises)
        batches = select_states(states, c, torch.tensor([0, 3, 1, 2]), most=part)
        noise = noise_for(number, "renoise", shape=(4, *backbone.latent_shape))
        levels = Levels(torch.tensor([0.4, 0.8, 0.6, 0.2]), noise)
        update_fake_score(base, batches, levels, state.fake_score)
        real_score = RealScore(empty, guidance_scale=3.0, lora_scale=0.5 / (number + 1))
        rl = WeightedLoss(lambda x0, batch: (x0.square().mean() * batch.share, {}), 0.5)
        trained = {"student": state.student, "fake_score": state.fake_score}
        update_student(base, batches, levels, real_score, rl=rl, **trained)
        state.advance({"update": number})
    return state


def give_prompts(base: SharedBase, prompts: list[str]) -> dict[str, torch.Tensor]:
    items = base.backbone.encode(prompts)[0]
    return {k: v.double() if v.is_floating_point() else v for k, v in base.backbone.collate(items).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lora_begins_with_the_numbers_and_names_of_peft(family, request):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    ours, theirs = make_base(folder), make_base(folder, PeftBase)
    for mine, other in (
        (ours.fake_parameters, theirs.fake_parameters),
        (ours.student_parameters, theirs.student_parameters),
        (dict(ours.backbone.network.named_parameters()), dict(theirs.backbone.network.named_parameters())),
    ):
        assert [*mine] == [*other], "also in the order, which a sum of squares has"
        assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in mine.items())


@pytest.mark.parametrize(("rank", "part"), [(None, None), (4, 2)], ids=["full-whole", "lora-parts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_those_with_peft(family, rank, part, request):
    """Weights and gradients after two updates of both networks, in double precision."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    bases = [make_base(folder, kind, rank=rank) for kind in (SharedBase, PeftBase)]
    for base in bases:
        move(base)
    states = [update(base, part=part, steps=2) for base in bases]
    for role in ("student", "fake_score"):
        ours, theirs = (state.trainables[role].parameters for state in states)
        assert sum(bool(each.grad is not None and each.grad.any()) for each in ours.values()) > 0.9 * len(ours)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_predictions_are_those_of_peft(family, request):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    ours, theirs = make_base(folder), make_base(folder, PeftBase)
    x_t, t = noise_for(1, "x", shape=(2, *ours.backbone.latent_shape)).double(), torch.tensor([0.5, 0.9]).double()
    found = []
    for base in (ours, theirs):
        move(base)
        base.backbone.network.float()
        c = {k: v.float() if v.is_floating_point() else v for k, v in give_prompts(base, PROMPTS).items()}
        with torch.no_grad():
            found.append((base.student(x_t.float(), t.float(), c), base.fake(x_t.float(), t.float(), c)))
    for mine, other in zip(*found, strict=True):
        assert ((mine - other).norm() / other.norm()).item() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_computed_again_with_the_adapter_of_the_forward(family, request):
    """No adapter is in use in the backward pass, and yet the gradients have the same bits."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    plain, again = make_base(folder), make_base(folder)
    for base in (plain, again):
        move(base)
    expected, found = update(plain, part=2), update(again, part=2, recompute=True)
    for role in ("student", "fake_score"):
        ours, theirs = (state.trainables[role].parameters for state in (found, expected))
        assert all(torch.equal(each.grad, theirs[name].grad) for name, each in ours.items() if each.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_runs_each_sample_at_a_scale_of_its_own(family, request):
    """Real score with the prompt, without it, and fake score: one call of 3 B instead of three of B."""
    base = make_base(request.getfixturevalue(f"tiny_{family}_folder"))
    move(base)
    x_t = noise_for(1, "x", shape=(2, *base.backbone.latent_shape)).double()
    t, c, empty = torch.tensor([0.5, 0.9]).double(), give_prompts(base, PROMPTS), give_prompts(base, ["", ""])
    calls = ((c, 0.3), (empty, 0.3), (c, base.fake_scale))

    def predict(scale, count: int, conditioning) -> torch.Tensor:
        with base.use_adapter(FAKE, scale) as network:
            return base.backbone.predict(network, x_t.repeat(count, 1, 1, 1), t.repeat(count), conditioning)

    apart = torch.cat([predict(scale, 1, each) for each, scale in calls])
    joined = {key: torch.cat([each[key] for each, _ in calls]) for key in c}
    scales = torch.tensor([scale for _, scale in calls]).double().repeat_interleave(2)
    torch.testing.assert_close(predict(scales, 3, joined), apart, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(apart[:2], apart[4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_zero_is_the_teacher_bit_for_bit(family, request):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    base, teacher = make_base(folder), copy_teacher(folder, 16)
    move(base)
    base.backbone.network.float()
    x_t, t = noise_for(1, "x", shape=(2, *teacher.latent_shape)), torch.tensor([0.5, 0.9])
    c = teacher.collate(teacher.encode(PROMPTS)[0])
    with base.use_adapter(FAKE, 0.0) as network:
        assert torch.equal(base.backbone.predict(network, x_t, t, c), teacher.predict(teacher.network, x_t, t, c))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_write_and_we_load_what_peft_writes(family, request):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    base, plain = make_base(folder), copy_teacher(folder, 16)
    move(base)
    base.backbone.network.float()
    x_t, t = noise_for(1, "x", shape=(2, *plain.latent_shape)), torch.tensor([0.5, 0.9])
    c = plain.collate(plain.encode(PROMPTS)[0])
    targets = list({name.split(".lora_")[0] for name in base.student_parameters})
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets)
    written = base.to_diffusers(STUDENT, {name: each.detach() for name, each in base.student_parameters.items()})
    network = inject_adapter_in_model(config, plain.network, "theirs")
    assert not set_peft_model_state_dict(network, written, "theirs").unexpected_keys
    with torch.no_grad():
        expected = plain.predict_x0(network, x_t, t, c)
        torch.testing.assert_close(base.student(x_t, t, c), expected, rtol=1e-4, atol=1e-5)
        again = base.from_diffusers(STUDENT, get_peft_model_state_dict(network, adapter_name="theirs"))
        assert again.keys() == base.student_parameters.keys()
        for name, value in again.items():
            torch.testing.assert_close(value, base.student_parameters[name].detach(), rtol=1e-6, atol=1e-9)
