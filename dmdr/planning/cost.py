"""Counts the memory and the work of a piece of code, operator by operator, on the meta device or on a real one.

1. Memory is the storage of every tensor that an operator returns, from that moment until the storage is freed. The
   rounding of an allocator, the workspaces of kernels and the CUDA context are not counted.
2. Work follows torch's own formulas. We cannot use its FlopCounterMode: it follows modules by hooks, and these keep
   activations alive that should be freed and computed again, which would spoil the count of memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class CostCounter(TorchDispatchMode):
    """Inside this context, counts the memory of one kind of device in bytes, and the work in FLOPs.

    live: memory that is held now. peak: the most that was held since the last `reset_peak`. flops: work so far.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known or size == 0:
                continue
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size)

    def reset_peak(self) -> int:
        """Set `peak` back to `live`, and return it."""
        self.peak = self.live
        return self.live

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops is not None:
            self.flops += count_flops(*args, **kwargs, out_val=result)
        self.hold(each for each in tree_iter(result) if isinstance(each, torch.Tensor))
        return result
