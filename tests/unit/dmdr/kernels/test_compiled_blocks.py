"""Compiled blocks: the same updates, few variants, whatever a schedule does; and what cannot compile is refused."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from dmdr.assembly.checks import check_compiled
from dmdr.config.few_steps import FewSteps
from dmdr.config.load import load_config
from dmdr.config.training import Optimizer, Training
from dmdr.errors import ConfigError
from dmdr.kernels import compiled_blocks
from dmdr.kernels.compiled_blocks import check_compiler, list_repeated_blocks
from dmdr.noise import noise_for
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.update import Levels, RealScore, roll_out, select_states, update_fake_score, update_student
from stages.runtime.prerequisites import check_training
from tests.support.tiny_teachers import copy_teacher


@pytest.fixture
def fresh_compiler():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def make_base(folder) -> SharedBase:
    """Of one block, to compile less."""
    backbone = copy_teacher(folder, 16)
    backbone.network.transformer_blocks = backbone.network.transformer_blocks[1:]
    return SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=4, seed=0)


def train(folder, *, backend: str | None, updates: int, recompute: str = "none") -> list[torch.Tensor]:
    """All trained weights after a number of updates of fake score and student, the real scale falling to 0.1 of 1."""
    base = make_base(folder)
    base.recompute_activations(recompute)
    if backend is not None:
        base.compile_blocks(backend=backend)
    backbone = base.backbone
    c, empty = (backbone.collate(backbone.encode(each)[0]) for each in (["a red circle", "two squares"], [""]))
    rate = Optimizer(learning_rate=1e-3, weight_decay=0.0)
    state = TrainState(base, Training(updates=99, batch_size=2, student=rate, fake_score=rate), ema=0.9)
    for number in range(updates):
        noises = noise_for(number, "rollout", shape=(2, 2, *backbone.latent_shape))
        states = roll_out(base, c, times=backbone.student_times(FewSteps(2)), noises=noises)
        batches = select_states(states, c, torch.tensor([0, 3]))
        levels = Levels(torch.tensor([0.4, 0.8]), noise_for(number, "renoise", shape=(2, *backbone.latent_shape)))
        update_fake_score(base, batches, levels, state.fake_score)
        real_score = RealScore(empty, guidance_scale=3.0, lora_scale=1 - 0.9 * number / updates)
        update_student(base, batches, levels, real_score, student=state.student, fake_score=state.fake_score)
        state.advance({"update": number})
    return [value.detach() for value in (*base.student_parameters.values(), *base.fake_parameters.values())]


@pytest.mark.slow
def test_updates_compile_four_variants_of_a_block_and_no_more_as_the_schedule_moves(tiny_sd3_folder, fresh_compiler):
    """By torch's tracing and differentiation, with its own operators in the place of generated ones: the same bits."""
    expected = train(tiny_sd3_folder, backend=None, updates=6)
    found = train(tiny_sd3_folder, backend="aot_eager", updates=6)
    print("graphs", fresh_compiler["stats"], "breaks", dict(fresh_compiler["graph_break"]))
    assert fresh_compiler["stats"]["unique_graphs"] == 4 and not fresh_compiler["graph_break"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.process
def test_a_generated_block_computes_the_same(tiny_sd3_folder, fresh_compiler):
    """By the compiler itself, with a gradient, the block compiled running again in the backward pass."""
    bases = []
    for compiled in (False, True):
        base = make_base(tiny_sd3_folder)
        base.recompute_activations("blocks")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in base.student_parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if compiled:
            base.compile_blocks()
        backbone = base.backbone
        c = backbone.collate(backbone.encode(["a red circle", "two squares"])[0])
        x_t = noise_for(1, "x", shape=(2, *backbone.latent_shape))
        prediction = base.student(x_t, torch.tensor([0.5, 0.9]), c)
        prediction.square().mean().backward()
        gradients = {name: each.grad for name, each in base.student_parameters.items() if each.grad is not None}
        bases.append((prediction.detach(), gradients))
    (expected, of_plain), (found, of_compiled) = bases
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert of_compiled.keys() == of_plain.keys() and len(of_plain) > 8
    for name, gradient in of_compiled.items():
        torch.testing.assert_close(gradient, of_plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_every_adapted_layer_lies_in_one_block_that_repeats(family, request):
    backbone = copy_teacher(request.getfixturevalue(f"tiny_{family}_folder"), 16)
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=4, seed=0)
    blocks = list_repeated_blocks(backbone.network)
    inside = [id(each) for block in blocks for each in block.parameters()]
    assert len(inside) == len(set(inside)), "a block would be compiled twice"
    assert {id(each) for each in base.fake_parameters.values()} <= set(inside)
    for block in blocks:  # as FSDP2 does to a block that it splits
        block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})
    assert list_repeated_blocks(backbone.network) == blocks


def test_a_family_of_changing_lengths_is_refused(tiny_config, tiny_sd3_folder, tiny_z_image_folder):
    config = load_config(tiny_config(execution={"device": "cpu", "compile": True}))
    check_compiled(config, copy_teacher(tiny_sd3_folder))
    with pytest.raises(ConfigError, match=r"^execution.compile .* z-image sees .*; set execution.compile: false$"):
        check_compiled(config, copy_teacher(tiny_z_image_folder))


@pytest.mark.parametrize(
    ("execution", "said"),
    [({"compile": True}, "execution.compile needs a compiler"), ({"attention": "cudnn"}, "needs an NVIDIA GPU")],
)
def test_the_first_stage_and_check_say_what_is_missing(tiny_config, monkeypatch, execution, said):
    monkeypatch.setattr(compiled_blocks.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        check_training(load_config(tiny_config(execution={"device": "cpu", **execution})))


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    check_compiler("cpu")
    monkeypatch.setattr(compiled_blocks.shutil, "which", lambda name: None)
    for device, name in (("cpu", "g\\+\\+"), ("cuda", "gcc")):
        with pytest.raises(
            ConfigError, match=rf"execution.compile needs a compiler, {name} .* execution.compile: false"
        ):
            check_compiler(device)
