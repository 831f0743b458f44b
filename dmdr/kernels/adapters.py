"""LoRAs beside the frozen layers of one network: any number of them, of which one or none is in use.

1. Names and initial values are PEFT's, number for number: NAME.base_layer.weight, NAME.lora_A.ROLE.weight,
   NAME.lora_B.ROLE.weight. So what either writes, the other loads.
2. No layer remembers which adapter runs. All layers of a network read it from one `InUse`, so that a switch costs
   nothing, and the scale is a tensor, whose value torch.compile does not depend on.
3. The products run in the dtype of the frozen weights. PEFT converts the input to float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dmdr.config.lora import Init


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA of the network and the factor of its product B A: a tensor () for all samples, or (B,), one a sample."""

    name: str
    scale: torch.Tensor


class InUse:
    """Which adapter the layers of one network run with. adapter: None is the bare network."""

    def __init__(self) -> None:
        self.adapter: Adapter | None = None

    @contextmanager
    def switch(self, adapter: Adapter | None) -> Iterator[None]:
        """Inside it, the network runs with this adapter; after it, with the one before."""
        before, self.adapter = self.adapter, adapter
        try:
            yield
        finally:
            self.adapter = before


class LoraLayer(nn.Module):
    """A frozen layer with adapters: base_layer(x) + scale B A x, of the adapter that is in use, if it has that one."""

    base_layer: nn.Linear | nn.Conv2d

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, in_use: InUse) -> None:
        super().__init__()
        self.base_layer, self.in_use = base_layer, in_use
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: diffusers' embeddings ask their layers for its dtype."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter, base = self.in_use.adapter, self.base_layer
        if adapter is None or adapter.name not in self.lora_A:
            return base(x)
        x = x.to(base.weight.dtype)  # once, for the base and for A
        out: torch.Tensor = base(x)
        down, up = (_get_weight(half[adapter.name]).to(x.dtype) for half in (self.lora_A, self.lora_B))
        if isinstance(base, nn.Conv2d):
            assert isinstance(base.padding, tuple), "no family pads by a name"
            return out + F.conv2d(_scale_samples(F.conv2d(x, down, None, base.stride, base.padding), adapter), up)
        reduced = _scale_samples(F.linear(x, down), adapter)
        # the product adds its result to the base's: no kernel of its own for the sum
        return torch.addmm(out.flatten(0, -2), reduced.flatten(0, -2), up.t()).view_as(out)


def _get_weight(half: nn.Module) -> torch.Tensor:
    """A or B of an adapter."""
    assert isinstance(half.weight, torch.Tensor)
    return half.weight


def _scale_samples(reduced: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """A x (B, ...), times the adapter's scale, which keeps its precision: the product is rounded, not the factor."""
    return (reduced * adapter.scale.view(-1, *(1 for _ in reduced.shape[1:]))).to(reduced.dtype)


def add_lora(
    network: nn.Module, in_use: InUse, name: str, *, rank: int, targets: list[str], init: Init = "kaiming"
) -> None:
    """Give a network an adapter, trained in float32, whose B is 0, so that it changes nothing yet.

    Adapters begin on the CPU unless a device is set, and then lie beside their layers.

    Args:
        in_use: the one of all adapters of this network.
        targets: names of linear and convolutional layers, or endings of names.
        init: of A: PEFT's default, uniform within 1 / sqrt(inputs), or gaussian, N(0, 1 / rank^2).
    """
    for path, layer in list(network.named_modules()):
        if not any(path == target or path.endswith(f".{target}") for target in targets):
            continue
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parent, _, own = path.rpartition(".")
            layer = LoraLayer(layer, in_use)
            setattr(network.get_submodule(parent), own, layer)
        if isinstance(layer, LoraLayer):
            down, up = _build_halves(layer.base_layer, rank, init)
            layer.lora_A[name], layer.lora_B[name] = (half.to(layer.weight.device) for half in (down, up))


def _build_halves(base: nn.Linear | nn.Conv2d, rank: int, init: Init) -> tuple[nn.Module, nn.Module]:
    """A and B. Each draws its own default values first, which are thrown away: PEFT's are of what follows these."""
    down: nn.Linear | nn.Conv2d
    up: nn.Linear | nn.Conv2d
    if isinstance(base, nn.Conv2d):
        down = nn.Conv2d(base.in_channels, rank, base.kernel_size, bias=False)  # type: ignore[arg-type]  # of a Conv2d
        up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
    else:
        down = nn.Linear(base.in_features, rank, bias=False)
        up = nn.Linear(rank, base.out_features, bias=False)
    if init == "gaussian":
        nn.init.normal_(down.weight, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down, up
