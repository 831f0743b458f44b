"""A frozen base in 8 or 4 bits: what is replaced, how far its products are off, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmdr.assembly.agreement import LOWEST, Probe, quantize_checked
from dmdr.assembly.networks import assemble, build_base
from dmdr.assembly.stage_config import select_stage
from dmdr.config.load import load_config
from dmdr.config.training import Training
from dmdr.errors import ConfigError
from dmdr.kernels import frozen_base
from dmdr.kernels.frozen_base import Float4Linear, Float8Linear, check_frozen_base, find_layers, quantize
from dmdr.planning.meta import build_meta_backbone
from dmdr.shared_base import SharedBase
from tests.support.tiny_teachers import copy_teacher

OPTIMIZER = {"learning_rate": 1e-4}
TRAINING = Training(updates=2, batch_size=2, student=OPTIMIZER, fake_score=OPTIMIZER)
# the rounding of one number: half of 2^-3 in float8_e4m3, on weight and input; half the widest gap of nf4's values
# times the largest of its block. Of sums of many, the root mean square is smaller
OFF = {"fp8": 0.06, "nf4": 0.15}
KINDS = ["fp8", "nf4"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_layer(kind: str, bias: bool) -> None:
    torch.manual_seed(3)
    block = nn.ModuleDict({"to_q": nn.Linear(64, 128, bias=bias)}).bfloat16().requires_grad_(False)
    network = Network(block)
    x = torch.randn(2, 5, 64, requires_grad=True)
    expected = x.double() @ block["to_q"].weight.double().T + (block["to_q"].bias.double() if bias else 0)
    direction = torch.randn(2, 5, 128)
    expected_gradient = direction.double() @ block["to_q"].weight.double()
    assert quantize(network, kind) == 1
    found = network.block["to_q"](x)
    found.backward(direction.to(found.dtype))
    assert found.dtype == torch.bfloat16 and x.grad is not None
    assert relative(found, expected) < OFF[kind]
    assert relative(x.grad, expected_gradient) < OFF[kind]


class Network(nn.Module):
    """What diffusers' networks have: the names of the blocks that they repeat."""

    _repeated_blocks = ["ModuleDict"]

    def __init__(self, block: nn.ModuleDict) -> None:
        super().__init__()
        self.block = block


def test_rows_of_any_size_are_rounded_alike() -> None:
    """A scale for each row: a row that is a million times smaller loses no more of itself. A row of zeros stays."""
    torch.manual_seed(4)
    linear = nn.Linear(32, 48, bias=False).bfloat16().requires_grad_(False)
    layer = Float8Linear(linear)
    x = torch.randn(1, 32).bfloat16()
    rows = torch.cat([x, x * 2**-20, torch.zeros_like(x)])
    y = layer(rows)
    assert torch.equal(y[1], y[0] * 2**-20) and not y[2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replaced(tiny_folder: Path, kind: str) -> None:
    """Layers of blocks, adapted ones too; not the LoRAs, nor what modulates norms. A full student stays whole."""
    backbone = copy_teacher(tiny_folder)
    base = SharedBase(backbone, fake_rank=2, fake_scale=1.0, student_rank=None, seed=1, compute=torch.bfloat16)
    names = {id(layer): name for name, layer in backbone.network.named_modules()}
    expected = {names[id(layer)] for _, _, layer in find_layers(backbone.network)}
    assert quantize(backbone.network, kind) == len(expected) > 0
    replaced = {
        name for name, layer in backbone.network.named_modules() if isinstance(layer, Float8Linear | Float4Linear)
    }
    assert replaced == expected
    assert any(".to_q" in name for name in replaced)
    assert not [name for name in replaced if "lora_" in name or "norm" in name or "embed" in name]
    assert not [each for each in base.student_network.modules() if isinstance(each, Float8Linear | Float4Linear)]
    assert all(each.requires_grad for each in base.fake_parameters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_are_trained(tiny_folder: Path, kind: str) -> None:
    backbone = copy_teacher(tiny_folder)
    base = SharedBase(backbone, fake_rank=2, fake_scale=1.0, student_rank=2, seed=1, compute=torch.bfloat16)
    quantize(backbone.network, kind)
    c = backbone.collate(backbone.encode(["a red circle"])[0])
    x0 = base.student(torch.randn(1, *backbone.latent_shape), torch.tensor([0.7]), c)
    x0.square().mean().backward()
    gradients = {name: each.grad for name, each in base.student_parameters.items()}
    ups = [grad for name, grad in gradients.items() if ".lora_B." in name]
    assert all(grad is not None and grad.isfinite().all() for grad in ups)
    assert any(grad.any() for grad in ups)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_recomputed_it_has_the_same_gradients(tiny_sd3_folder: Path, kind: str) -> None:
    found = []
    for compiled in (False, True):
        backbone = copy_teacher(tiny_sd3_folder)
        base = SharedBase(backbone, fake_rank=2, fake_scale=1.0, student_rank=2, seed=1, compute=torch.bfloat16)
        quantize(backbone.network, kind)
        if compiled:
            base.recompute_activations("blocks")
            base.compile_blocks(backend="aot_eager")
        c = backbone.collate(backbone.encode(["a red circle"])[0])
        x_t = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
        base.student(x_t, torch.tensor([0.7]), c).square().mean().backward()
        found.append([each.grad for each in base.student_parameters.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)  # of bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_compares_before_it_trains(
    tiny_config: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config(precision="bfloat16", frozen_base=kind))
    backbone = copy_teacher(Path(config.teacher.path))
    base = build_base(config, backbone)
    probe = Probe(
        c=backbone.collate(backbone.encode(["a red circle", "a blue square"])[0]),
        unconditional=backbone.collate(backbone.encode([""])[0]),
        time=0.9,
        guidance_scale=3.0,
        seed=1,
        training=TRAINING,
    )
    cosine = quantize_checked(base, kind, probe)
    assert LOWEST <= cosine < 1, "rounding is seen, and is small"
    monkeypatch.setattr("dmdr.assembly.agreement.LOWEST", 0.9999999)
    again = copy_teacher(Path(config.teacher.path))
    with pytest.raises(ConfigError, match=rf"frozen_base {kind} turns the gradient.*cosine.*drop frozen_base"):
        quantize_checked(build_base(config, again), kind, probe)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"frozen_base": "fp8"}, r"frozen_base is fp8.*precision is float32; set precision: bfloat16"),
        (
            {
                "frozen_base": "nf4",
                "precision": "bfloat16",
                "execution": {"device": "cpu", "sharding": "fsdp", "processes": 2},
            },
            r"frozen_base nf4 cannot be split.*execution.sharding is fsdp; set sharding: none",
        ),
        ({"frozen_base": "int8", "precision": "bfloat16"}, r"frozen_base.*fp8.*nf4"),
    ],
)
def test_refused_by_the_config(tiny_config: Callable[..., Path], changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        load_config(tiny_config(**changes))
    assert "\n" not in str(raised.value)


def test_refused_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_base, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nf4, which needs bitsandbytes.*pip install bitsandbytes"):
        check_frozen_base("nf4", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        ConfigError,
        match=r"need compute capability 8.9, and NVIDIA A100 has 8.0; drop frozen_base",
    ):
        check_frozen_base("fp8", "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_frozen_base("fp8", "cuda:0")
    check_frozen_base("fp8", "cpu")


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer of the teacher's blocks can be quantized"):
        quantize(Network(nn.ModuleDict({"to_q": nn.Linear(10, 16)})), "fp8")


def test_the_planner_assembles_it_on_meta(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config(precision="bfloat16", frozen_base="nf4"))
    backbone = build_meta_backbone(config.teacher)
    assembly = assemble(config, select_stage(config, "cold_start"), backbone)
    backbone.compute = torch.float32  # as the planner does, for there is no autocast on meta
    layers = [each for each in backbone.network.modules() if isinstance(each, Float4Linear)]
    assert layers and all(each.packed.numel() * 2 == each.in_features * each.out_features for each in layers)
    c = {key: value.to("meta") for key, value in backbone.collate([backbone.blank()]).items()}
    x0 = assembly.base.student(torch.empty(1, *backbone.latent_shape, device="meta"), torch.empty(1, device="meta"), c)
    assert x0.shape == (1, *backbone.latent_shape)
