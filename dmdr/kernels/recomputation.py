"""What the backward pass computes again instead of keeping it (`execution.gradient_checkpointing`).

1. all: the blocks of networks and of the decoder keep their inputs, and run again. blocks: those of the networks only.
2. attention: as blocks, but what attention returned is kept, so that its kernel, the dearest of a block at high
   resolutions, does not run twice.
3. What is computed again is the same bit for bit.
4. A gradient that is clipped apart takes a second backward pass through the same blocks, which then run a third time.
   What attention returned is kept for one pass, so the config refuses attention beside a matched weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from dmdr.config.execution import Recomputation

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]  # of the first run, and of the next
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def make_contexts(what: Recomputation) -> Contexts:
    """Two contexts of a block: the first keeps what the second, in the backward pass, need not compute again."""
    if what == "attention":
        keep, reuse = create_selective_checkpoint_contexts(_choose)
        return keep, reuse
    return nullcontext(), nullcontext()


class Again:
    """A context that may be entered once for each backward pass through a block. build: makes it anew."""

    def __init__(self, build: Callable[[], AbstractContextManager[object]]) -> None:
        self.build = build
        self._entered: list[AbstractContextManager[object]] = []

    def __enter__(self) -> None:
        context = self.build()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def _choose(context: SelectiveCheckpointContext, operator: OpOverload, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
