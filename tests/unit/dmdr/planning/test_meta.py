"""The arithmetic of a GPU on the meta device: what autocast casts, also in attention modules and recomputed blocks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmdr.planning.meta import Arithmetic


class Block(nn.Module):
    """What a CLIP tower is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.out = (
            nn.LayerNorm(8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def run_twice(arithmetic: Arithmetic, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a block whose activations the backward pass computes again, in an equal context."""
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), arithmetic.recompute()))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_computes_in_the_lower_precision_and_learns_in_float32(compute: torch.dtype, recompute: bool) -> None:
    with torch.device("meta"):
        block, x = Block(), torch.zeros(2, 5, 8, requires_grad=True)
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []
    with Arithmetic(compute, []) as arithmetic:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append((tuple(t.shape), t.dtype)) or t, lambda t: t
        ):
            y = run_twice(arithmetic, block, x) if recompute else block(x)
        y.sum().backward()
    assert y.dtype == compute
    assert {parameter.grad.dtype for parameter in block.parameters()} == {x.grad.dtype} == {torch.float32}
    heads = [dtype for shape, dtype in kept if shape == (2, 2, 5, 4)]
    assert set(heads) == ({compute} if not recompute else set()), "queries, keys and values are kept as computed"
    assert not [shape for shape, _ in kept if shape[-2:] == (5, 5)], "the fused kernel keeps no weights"


def test_exempt_parameters_stay_in_float32() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(8, 8), torch.zeros(2, 8)
    with Arithmetic(torch.bfloat16, layer.parameters()):
        assert layer(x).dtype == torch.float32
    with Arithmetic(torch.bfloat16, []):
        assert layer(x).dtype == torch.bfloat16
