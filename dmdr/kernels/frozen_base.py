"""The frozen base in 8 or 4 bits: the linear layers of its blocks, which hold nearly all of its weights and work.

1. fp8: weights and inputs are rounded to float8_e4m3, each row with a scale of its own, and multiplied by the 8-bit
   units of a GPU. A frozen layer has no weight gradient, so its backward pass is one product, in 8 bits too, with a
   copy of the weights whose scales go along the other side. Both copies take together what bfloat16 takes. torchao's
   layer for training computes a weight gradient whether it is asked for or not, and keeps the input for it.
2. nf4 (QLoRA, arXiv 2305.14314): a weight takes 4 bits, and 64 of them share a scale of 4 bytes. The products are
   bfloat16's, so this saves memory and no time. The kernels are those of bitsandbytes.
3. Embeddings, modulations of norms and the last layer stay as they are: they are small, and everything goes through
   them. So do layers whose sides are no multiples of 16, which 8-bit units cannot multiply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from dmdr.config.run import FrozenBase
from dmdr.errors import ConfigError
from dmdr.kernels.compiled_blocks import list_repeated_blocks

EIGHT_BITS = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT_BITS).max
MULTIPLE = 16  # of both sides of a layer
BLOCK = 64  # weights that share a scale in 4 bits
KEPT = ("lora_", "norm")  # parts of names of layers that stay as they are
CAPABILITY = (8, 9)  # of the first CUDA devices that multiply 8-bit numbers: Ada and Hopper


def check_frozen_base(kind: FrozenBase | None, device: str) -> None:
    """Refuse a frozen base that cannot be computed here. device: cpu, cuda or cuda:N.

    Raises:
        ConfigError: the GPU has no 8-bit units, or bitsandbytes is missing.
    """
    if kind == "fp8" and device.startswith("cuda") and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        has, needed = (".".join(map(str, each)) for each in (found, CAPABILITY))
        raise ConfigError(
            f"frozen_base is fp8, whose products need compute capability {needed}, and "
            f"{torch.cuda.get_device_name(device)} has {has}; drop frozen_base, or set nf4"
        )
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "frozen_base is nf4, which needs bitsandbytes, and that is not installed; pip install bitsandbytes, or "
            "drop frozen_base"
        )


@torch.no_grad()
def quantize(network: ModelMixin, kind: FrozenBase) -> int:
    """Replace the frozen linear layers of a network's blocks, adapted or not; return how many.

    Raises:
        ConfigError: it has no layer that can be replaced.
    """
    layer = {"fp8": Float8Linear, "nf4": Float4Linear}[kind]
    found = list(find_layers(network))
    if not found:
        raise ConfigError(f"frozen_base is {kind}, but no layer of the teacher's blocks can be quantized; drop it")
    for parent, name, linear in found:
        setattr(parent, name, layer(linear))
    return len(found)


def find_layers(network: ModelMixin) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The layers that `quantize` replaces: of which module each is a part, its name there, and itself."""
    for block in list_repeated_blocks(network):
        for path, parent in block.named_modules():
            for name, layer in parent.named_children():
                if type(layer) is not nn.Linear or any(part in f"{path}.{name}" for part in KEPT):
                    continue
                if layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0:
                    yield parent, name, layer


class FrozenLinear(nn.Module, ABC):
    """What the two forms share: sides, bias, and a product in bfloat16 of inputs of any shape (..., in).

    weight: has no numbers. Adapters and attention ask it for the dtype in which the layer computes, and for its device.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.new_empty(0, dtype=torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(x.to(self.weight.dtype).reshape(-1, self.in_features))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, in) times W^T: (rows, out). Its gradient goes to x alone."""


class Float8Linear(FrozenLinear):
    """A frozen linear layer in float8: W (out, in) with a scale for each row, and W^T (in, out) with its own."""

    forth: torch.Tensor
    forth_scale: torch.Tensor
    back: torch.Tensor
    back_scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        for name, weight in {"forth": linear.weight, "back": linear.weight.t().contiguous()}.items():
            rounded, scale = round_rows(weight)
            self.register_buffer(name, rounded)
            self.register_buffer(f"{name}_scale", scale)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        factors = (self.forth, self.forth_scale, self.back, self.back_scale)
        return cast(torch.Tensor, Float8Product.apply(x, *factors))


class Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        forth, forth_scale, back, back_scale = factors
        ctx.save_for_backward(back, back_scale)
        return multiply(x, forth, forth_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return multiply(gradients[0], *ctx.saved_tensors), None, None, None, None


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers (rows, columns) in float8, and the scale (rows, 1) of each row that brings its largest to the end."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(EIGHT_BITS), scale


def multiply(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """x (rows, in) times weight (out, in) transposed, in float8: (rows, out) in bfloat16."""
    rounded, scale = round_rows(x)
    if x.device.type == "meta":
        return torch.mm(x, weight.t().to(x.dtype))
    rows = ScalingType.RowWise
    return scaled_mm(rounded, weight.t(), scale, rows, weight_scale.t(), rows, output_dtype=torch.bfloat16)


class Float4Linear(FrozenLinear):
    """A frozen linear layer in nf4: two weights a byte (out * in / 2, 1), and the largest of every 64 of them."""

    packed: torch.Tensor
    largest: torch.Tensor
    table: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        packed, largest, table = pack(linear.weight.detach().to(torch.bfloat16))
        self.register_buffer("packed", packed)
        self.register_buffer("largest", largest)
        self.register_buffer("table", table)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return cast(torch.Tensor, Float4Product.apply(x, shape, self.packed, self.largest, self.table))


class Float4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], *factors: torch.Tensor) -> torch.Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*factors)
        return F.linear(x, unpack(shape, *factors))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = unpack(ctx.shape, *ctx.saved_tensors)
        return gradients[0].to(weight.dtype) @ weight, None, None, None, None


def unpack(shape: tuple[int, int], packed: torch.Tensor, largest: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) of what `pack` returned, in bfloat16."""
    if packed.device.type == "meta":
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    sizes = {"shape": torch.Size(shape), "blocksize": BLOCK, "dtype": torch.bfloat16}
    return dequantize_4bit(packed, QuantState(largest, code=table, quant_type="nf4", **sizes))


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (out, in) as its 4-bit numbers, the largest of every block, and the 16 values that 4 bits stand for."""
    if weight.device.type == "meta":
        sizes = ((weight.numel() // 2, 1), torch.uint8), ((weight.numel() // BLOCK,), torch.float32)
        packed, largest = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sizes)
        return packed, largest, torch.empty(16, device="meta")
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax, state.code
