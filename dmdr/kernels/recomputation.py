"""What the backward pass computes again instead of keeping it (`execution.gradient_checkpointing`).

1. all: the blocks of networks and of the decoder keep their inputs, and run again. blocks: those of the networks only.
2. attention: as blocks, but what attention returned is kept, so that its kernel, the dearest of a block at high
   resolutions, does not run twice.
3. What is computed again is the same bit for bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


def _choose(context: SelectiveCheckpointContext, operator: OpOverload, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
