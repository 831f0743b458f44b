"""The most memory that a piece of code holds: counted tensor by tensor, on the meta device as well as on a real one.

What is counted is the storage of every tensor that an operator returns, from then until it is freed. An allocator's
rounding, kernels' workspaces and the CUDA context are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryCounter(TorchDispatchMode):
    """Inside it, `live` is what is held and `peak` the most that was, in bytes; `peak` may be set back to `live`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known or size == 0:
                continue
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.hold(each for each in tree_iter(found) if isinstance(each, torch.Tensor))
        return found
