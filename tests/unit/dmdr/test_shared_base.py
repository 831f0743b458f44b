"""bfloat16: what is frozen is stored in it, what is trained is float32 and moves by less than bfloat16 can tell."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr import optimizers
from dmdr.config.few_steps import FewSteps
from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.training import Optimizer, Training
from dmdr.errors import ConfigError
from dmdr.noise import noise_for
from dmdr.shared_base import STUDENT, SharedBase
from dmdr.state import TrainState
from dmdr.update import Levels, RealScore, roll_out, select_states, update_fake_score, update_student
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two squares"]
SMALL = 1e-6  # a learning rate whose steps bfloat16 cannot tell: an ulp of a weight of 0.1 is 0.0005


def made(folder, compute, *, rank=None, kind="adamw", rate=SMALL) -> tuple[SharedBase, TrainState]:
    backbone = copy_teacher(folder, resolution=16)
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=rank, seed=0, compute=compute)
    optimizer = Optimizer(learning_rate=rate, weight_decay=0.0, kind=kind)
    return base, TrainState(base, Training(updates=9, batch_size=2, student=optimizer, fake_score=optimizer), ema=0.9)


def updated(base: SharedBase, state: TrainState, number: int = 0) -> dict[str, float]:
    """One update of both networks on fixed noise."""
    backbone = base.backbone
    c, empty = backbone.collate(backbone.encode(PROMPTS)[0]), backbone.collate(backbone.encode([""])[0])
    noises = noise_for(number, "rollout", shape=(2, 2, *backbone.latent_shape))
    batches = select_states(
        roll_out(base, c, times=backbone.student_times(FewSteps(2)), noises=noises), c, torch.tensor([0, 3])
    )
    levels = Levels(torch.tensor([0.4, 0.8]), noise_for(number, "renoise", shape=(2, *backbone.latent_shape)))
    found = update_fake_score(base, batches, levels, state.fake_score)
    real_score = RealScore(empty, guidance_scale=3.0, lora_scale=0.5)
    found = {
        "first_fake": found["loss_fake"],
        **update_student(base, batches, levels, real_score, student=state.student, fake_score=state.fake_score),
    }
    state.advance({"update": number})
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_losses_are_those_of_float32_to_the_rounding(request, family, rank):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    exact = updated(*made(folder, torch.float32, rank=rank))
    rounded = updated(*made(folder, torch.bfloat16, rank=rank))
    for name in ("first_fake", "loss_dm", "loss_fake"):
        print(f"{family} {name}: {rounded[name]:.5f}, in float32 {exact[name]:.5f}")
    for name in ("first_fake", "loss_fake"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.01)  # bfloat16 has 8 bits: 0.4 % a number
    # the root of 2 L_dm is the size of the scores' difference in units of |x0 - x0_real|; both scores are rounded
    assert (2 * rounded["loss_dm"]) ** 0.5 == pytest.approx((2 * exact["loss_dm"]) ** 0.5, abs=0.02)
    assert rounded != exact


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_what_is_trained_is_float32(tiny_sd3_folder, rank):
    base, state = made(tiny_sd3_folder, torch.bfloat16, rank=rank)
    base.keep_reference()
    seen = []
    base.backbone.network.time_text_embed.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    updated(base, state)
    assert set(seen) == {torch.float32}, "1000 t does not fit bfloat16"
    frozen = {p.dtype for n, p in base.backbone.network.named_parameters() if ".lora_" not in n}
    assert frozen == {torch.bfloat16}
    assert {value.dtype for value in state.tensors().values()} == {torch.float32}
    assert (
        base.student(
            torch.zeros(1, *base.backbone.latent_shape),
            torch.ones(1),
            base.backbone.collate(base.backbone.encode(PROMPTS[:1])[0]),
        ).dtype
        == torch.float32
    )


def test_master_weights_move_where_a_bfloat16_student_stands_still(tiny_sd3_folder):
    base, state = made(tiny_sd3_folder, torch.bfloat16)
    before = {name: value.detach().clone() for name, value in base.student_parameters.items()}
    pure = copy.deepcopy(base.student_network).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(pure.parameters(), lr=SMALL, betas=(0.0, 0.99), weight_decay=0.0)
    start = {name: value.detach().clone() for name, value in pure.named_parameters()}
    for number in range(3):
        updated(base, state, number)
        for name, parameter in pure.named_parameters():
            gradient = base.student_parameters[name].grad
            parameter.grad = None if gradient is None else gradient.bfloat16()
        optimizer.step()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in base.student_parameters.items()}
    assert sum(amount > 0 for amount in moved.values()) > len(moved) / 2
    assert max(moved.values()) < 4 * SMALL * 3
    weights = [name for name in before if name.endswith("to_q.weight")]
    assert weights
    for name in weights:
        still = (start[name] == dict(pure.named_parameters())[name]) | (start[name].abs() < 1e-3)
        assert bool(still.all()), "a step this small must vanish in bfloat16, or this test shows nothing"
        assert moved[name] > 0
        assert float((state.ema[name] - before[name]).abs().max()) > 0


@pytest.mark.parametrize("kind", ["adamw", "fused", "8bit"])
def test_a_resumed_optimizer_ends_with_the_same_bits(tiny_sd3_folder, tmp_path, kind):
    """Through a file of safetensors, so that nothing but tensors can have been saved."""
    whole, state = made(tiny_sd3_folder, torch.float32, kind=kind, rate=1e-3)
    for number in range(4):
        updated(whole, state, number)
        if number == 1:
            save_file({name: value.contiguous() for name, value in state.tensors().items()}, tmp_path / "state")
            info = {**state.info(), "rows": list(state.rows)}
    base, resumed = made(tiny_sd3_folder, torch.float32, kind=kind, rate=1e-3)
    resumed.restore(load_file(tmp_path / "state"), info)
    for number in range(2, 4):
        updated(base, resumed, number)
    found, expected = resumed.tensors(), state.tensors()
    assert found.keys() == expected.keys() and len(found) > 4 * len(base.student_parameters)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("kind", "apart"), [("fused", 1e-5), ("8bit", 4e-3)])
def test_optimizers_take_the_same_steps(tiny_sd3_folder, kind, apart):
    """The learning rate is 1e-3, so that three steps without a sense of direction would be up to 6e-3 apart."""
    ends = []
    for each in ("adamw", kind):
        base, state = made(tiny_sd3_folder, torch.float32, kind=each, rate=1e-3)
        for number in range(3):
            updated(base, state, number)
        ends.append(torch.cat([value.detach().flatten() for value in base.student_parameters.values()]))
    assert torch.equal(ends[0], ends[1]) is False
    assert float((ends[0] - ends[1]).abs().mean()) < apart / 4 and float((ends[0] - ends[1]).abs().max()) < apart


def test_what_an_optimizer_cannot_do_is_said_before_the_first_step(monkeypatch):
    eight, plain = Optimizer(learning_rate=1e-3, kind="8bit"), Optimizer(learning_rate=1e-3)
    training = Training(updates=1, batch_size=1, student=plain, fake_score=eight)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"joint.fake_score.kind 8bit needs bitsandbytes.*pip install bitsandbytes"):
        optimizers.check_optimizers(training, "joint", split=False)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    optimizers.check_optimizers(training, "joint", split=True)
    training = Training(updates=1, batch_size=1, student=eight, fake_score=plain)
    with pytest.raises(ConfigError, match=r"cold_start.student.kind 8bit cannot have .* fsdp"):
        optimizers.check_optimizers(training, "cold_start", split=True)


def test_the_student_of_a_lora_run_is_what_the_base_wears(tiny_sd3_folder):
    """Adapters in float32 on a base in bfloat16: they change what it says."""
    base, _ = made(tiny_sd3_folder, torch.bfloat16, rank=4)
    c = base.backbone.collate(base.backbone.encode(PROMPTS)[0])
    x_t, t = noise_for(1, "x", shape=(2, *base.backbone.latent_shape)), torch.tensor([0.5, 1.0])
    plain = base.student(x_t, t, c)
    with torch.no_grad():
        for name, parameter in base.student_parameters.items():
            assert f".{STUDENT}." in name and parameter.dtype == torch.float32
            parameter.add_(0.05)
    assert float((base.student(x_t, t, c) - plain).abs().max()) > 1e-3


def test_an_adapter_is_on_only_inside_its_block(tiny_sd3_folder):
    """After the block, also one that fails, the base is the fake score again, and every LoRA can still be trained."""
    base, _ = made(tiny_sd3_folder, torch.float32, rank=4)
    base.keep_reference()
    trained = [*base.fake_parameters.values(), *base.student_parameters.values()]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05)
    c = base.backbone.collate(base.backbone.encode(PROMPTS)[0])
    x_t, t = noise_for(1, "x", shape=(2, *base.backbone.latent_shape)), torch.tensor([0.5, 1.0])

    def predict() -> torch.Tensor:
        return base.backbone.predict(base.backbone.network, x_t, t, c)

    fake = base.fake(x_t, t, c)
    assert torch.equal(predict(), fake)
    for scale in (0.0, 1.0):
        with pytest.raises(KeyError), base.use_adapter(STUDENT, scale):
            assert not torch.equal(predict(), fake)
            raise KeyError
        assert torch.equal(predict(), fake)
    assert all(parameter.requires_grad for parameter in trained)


def test_precision_and_optimizer_name_a_result_and_their_defaults_leave_old_names_alone(tiny_config):
    rate = {"learning_rate": 1e-4}
    training = {"updates": 2, "batch_size": 2, "student": rate, "fake_score": rate}
    fused = {**training, "student": {**rate, "kind": "fused"}}
    plain = identity(load_config(tiny_config(cold_start=training)), "cold_start")
    assert not [key for key in plain if key.endswith("kind") or key == "precision"]
    assert identity(load_config(tiny_config(cold_start=training, precision="float32")), "cold_start") == plain
    rounded = identity(load_config(tiny_config(cold_start=training, precision="bfloat16")), "cold_start")
    assert rounded == {**plain, "precision": "bfloat16"}
    assert identity(load_config(tiny_config(cold_start=fused)), "cold_start") == {
        **plain,
        "cold_start.student.kind": "fused",
    }
    split = {"processes": 2, "sharding": "fsdp"}
    assert identity(load_config(tiny_config(cold_start=training, execution=split)), "cold_start") == plain
