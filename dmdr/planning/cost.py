"""What a piece of code costs, operator by operator, on the meta device as well as on a real one: memory and work.

1. Memory is the storage of every tensor that an operator returns, from then until it is freed. An allocator's rounding,
   kernels' workspaces and the CUDA context are not seen.
2. Work is by torch's own formulas. Its FlopCounterMode follows modules, too, by hooks that keep activations alive where
   they are to be recomputed, so that memory could not be counted beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class CostCounter(TorchDispatchMode):
    """Inside it, `live` is what is held and `peak` the most that was, in bytes, and `flops` the work that was done;
    `peak` may be set back to `live`. Memory is that of one kind of device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before."""
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
            weakref.finalize(storage, self._freed, key, size)

    def reset_peak(self) -> int:
        """Begin a new peak at what is held now, and return that."""
        self.peak = self.live
        return self.live

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=found)
        self.hold(each for each in tree_iter(found) if isinstance(each, torch.Tensor))
        return found
