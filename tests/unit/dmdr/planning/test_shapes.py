"""Remembered shapes beside torch's own: the same tensors, the same memory, the same work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dmdr.planning.cost import CostCounter
from dmdr.planning.meta import build_from_configs
from dmdr.planning.shapes import KnownShapes

OPERATIONS = {
    "broadcast": lambda x: x + torch.empty(5, 1, 2, 1, device="meta"),
    "a number of another type": lambda x: (x.int() * 2, x.int() * 2.0, x.int() * True),
    "strides that stay": lambda x: x.transpose(0, 2) * 3,
    "strides that are made": lambda x: x.transpose(0, 2).contiguous().reshape(-1),
    "several": lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
    "half": lambda x: torch.nn.functional.linear(x.half(), torch.empty(6, 4, dtype=torch.half, device="meta")),
    "a view": lambda x: x.view(12)[3:],
    "a view that its schema hides": lambda x: torch.ops.aten._unsafe_view(x, (3, 4)),
    "in place": lambda x: x.mul_(2).add_(1),
    "in place, through a view": lambda x: x[:, 0].copy_(torch.empty(4, device="meta")),
    "another size in place": lambda x: x.clone().resize_(7),
    "into what is given": lambda x: torch.add(x, x, out=torch.empty(3, 1, 4, device="meta")),
    "reduced": lambda x: (x.sum(), x.mean((0, 2), keepdim=True), x.amax(1)),
}


def told(found: object) -> list[tuple]:
    """All that can be told of tensors, and which of them share memory."""
    tensors = tree_leaves(found)
    memory = [each.untyped_storage() for each in tensors]
    known = [each._cdata for each in memory]
    return [
        (each.shape, each.stride(), each.dtype, each.storage_offset(), own.nbytes(), known.index(own._cdata))
        for each, own in zip(tensors, memory, strict=True)
    ]


def sharing(found: object, x: torch.Tensor) -> list[bool]:
    """Which of the tensors lie in x's memory."""
    return [each.untyped_storage()._cdata == x.untyped_storage()._cdata for each in tree_leaves(found)]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_same_comes_back(operation: Callable[[torch.Tensor], object]):
    x = torch.empty(3, 1, 4, device="meta")
    found = operation(x)
    expected = told(found), sharing(found, x)
    with KnownShapes():
        for _ in range(3):
            found = operation(x)
            assert (told(found), sharing(found, x)) == expected
    assert x.shape == (3, 1, 4)


def test_what_does_not_fit_is_refused_each_time():
    a, b = torch.empty(2, 3, device="meta"), torch.empty(4, device="meta")
    with KnownShapes():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                a + b
            with pytest.raises(RuntimeError):
                a.add_(b)


def test_numbers_are_never_remembered():
    with KnownShapes():
        for n in range(3):
            assert (torch.tensor([n, 1.0]) * 2).tolist() == [2 * n, 2.0]


class Asked(TorchDispatchMode):
    """Counts what torch has to work out."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function is not torch.ops.aten.empty_strided.default
        return function(*args, **(kwargs or {}))


def test_training_costs_the_same_and_torch_is_asked_for_less(tiny_folder: Path):
    """Forward, backward and steps of AdamW of both families' networks."""
    backbone = build_from_configs(tiny_folder)
    network = backbone.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters())
    item = backbone.collate([backbone.blank()] * 3)

    def train() -> None:
        x_t, t = torch.randn(3, *backbone.latent_shape, device="meta"), torch.rand(3, device="meta")
        backbone.predict(network, x_t, t, item).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def cost_of(train: Callable[[], None]) -> tuple[int, int, int]:
        with CostCounter("meta") as cost:
            train()
        return cost.peak, cost.flops, cost.live

    train()  # the optimizer has its moments now
    with Asked() as all_of_it:
        expected = cost_of(train)
    with Asked() as rest, KnownShapes():
        train()
        rest.count = 0
        assert cost_of(train) == expected
    print(f"torch was asked {rest.count:,} times of {all_of_it.count:,}")
    assert min(expected[:2]) > 0 and rest.count < all_of_it.count / 3
    with KnownShapes(), FlopCounterMode(display=False) as counter:
        train()
    assert counter.get_total_flops() == expected[1]
