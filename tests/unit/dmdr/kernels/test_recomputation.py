"""What the backward pass computes again: the same bits for every choice, and work and memory in the order promised."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dmdr.config.load import load_config
from dmdr.errors import ConfigError
from dmdr.kernels.recomputation import ATTENTION
from dmdr.noise import noise_for
from dmdr.planning.cost import CostCounter
from dmdr.shared_base import SharedBase
from tests.support.tiny_teachers import copy_teacher
from tests.support.training_results import TRAINING

CHOICES = ("none", "attention", "blocks", "all")


class Count(TorchDispatchMode):
    """How often attention runs forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in ATTENTION
        return func(*args, **(kwargs or {}))


def take_gradients(folder, what: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """The gradients of a loss of the decoded student and of the fake score; attention's forward runs; FLOPs."""
    base = SharedBase(copy_teacher(folder, 16), fake_rank=2, fake_scale=2.0, student_rank=4, seed=0)
    generator = torch.Generator().manual_seed(1)
    trained = {**base.student_parameters, **base.fake_parameters}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    base.recompute_activations(what)
    backbone = base.backbone
    x_t, t = noise_for(1, "x", shape=(2, *backbone.latent_shape)), torch.tensor([0.5, 0.9])
    c = backbone.collate(backbone.encode(["a red circle", "two squares"])[0])
    with CostCounter("cpu") as cost, Count() as count:
        loss = backbone.decode(base.student(x_t, t, c)).square().mean() + base.fake(x_t, t, c).square().mean()
        loss.backward()
    return {name: each.grad for name, each in trained.items() if each.grad is not None}, count.calls, cost.flops


@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_every_choice_gives_the_same_bits(family, request):
    """Attention that is kept runs once forward, else twice. Each choice does as much work as the one before, or more.

    torch's formulas know no work of attention on a CPU.
    """
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    found = {what: take_gradients(folder, what) for what in CHOICES}
    gradients, calls, flops = ({what: each[index] for what, each in found.items()} for index in range(3))
    for what in CHOICES[1:]:
        assert gradients[what].keys() == gradients["none"].keys()
        assert all(torch.equal(value, gradients["none"][name]) for name, value in gradients[what].items()), what
    assert calls["attention"] == calls["none"] > 0 and calls["blocks"] > calls["none"]
    assert flops["none"] < flops["attention"] <= flops["blocks"] < flops["all"]


def test_blocks_run_again_by_the_attention_of_their_first_run(tiny_sd3_folder):
    """The backward pass runs outside of the choice of a kernel."""
    base = SharedBase(copy_teacher(tiny_sd3_folder, 16), fake_rank=2, fake_scale=2.0, student_rank=4, seed=0)
    base.backbone.attention = "flash"
    base.recompute_activations("blocks")
    backbone = base.backbone
    c = backbone.collate(backbone.encode(["a red circle"])[0])
    loss = base.student(noise_for(1, "x", shape=(1, *backbone.latent_shape)), torch.tensor([0.5]), c).square().mean()
    with Count() as count, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    assert count.calls == len(backbone.network.transformer_blocks), "by the formula, none would be counted"


def test_a_second_backward_pass_through_the_same_blocks_has_the_same_bits(tiny_sd3_folder):
    """As where RL's gradient is weighed apart: the blocks run a third time."""
    found = []
    for what in ("none", "blocks", "all"):
        base = SharedBase(copy_teacher(tiny_sd3_folder, 16), fake_rank=2, fake_scale=2.0, student_rank=4, seed=0)
        base.recompute_activations(what)
        backbone, parameters = base.backbone, list(base.student_parameters.values())
        c = backbone.collate(backbone.encode(["a red circle"])[0])
        x0 = base.student(noise_for(1, "x", shape=(1, *backbone.latent_shape)), torch.tensor([0.5]), c)
        first = torch.autograd.grad(x0.square().mean(), parameters, retain_graph=True)
        found.append([*first, *torch.autograd.grad(x0.abs().mean(), parameters)])
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], each, strict=True))
    assert any(each.any() for each in found[0])


def test_attention_that_is_kept_for_one_pass_is_refused_beside_a_matched_weight(tiny_config):
    rl = {"algorithm": "refl", "weight": 1.0, "weight_is": "matched", "rewards": {"lab-conv": 1.0}}
    joint = {**TRAINING, "rl": rl}
    with pytest.raises(ConfigError, match=r"attention keeps results for one backward pass.*joint.rl.weight_is matched"):
        load_config(tiny_config(joint=joint, execution={"device": "cpu", "gradient_checkpointing": "attention"}))
    load_config(tiny_config(joint=joint, execution={"device": "cpu", "gradient_checkpointing": "blocks"}))
