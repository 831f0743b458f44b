"""Counts the memory and the work of a piece of code, operator by operator, on the meta device or on a real one.

1. Memory is the storage of every tensor that an operator returns, from that moment until the storage is freed. The
   rounding of an allocator, the workspaces of kernels and the CUDA context are not counted.
2. Work follows torch's own formulas. We cannot use its FlopCounterMode: it follows modules by hooks, and these keep
   activations alive that should be freed and computed again, which would spoil the count of memory.
3. An operator's bytes are those of all its tensors, each read or written once. Views and empty tensors move nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dmdr.planning.shapes import Call, list_tensors
from dmdr.planning.work import Kind, Tally, Work

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
CONVOLUTIONS = {aten.convolution, aten._convolution, aten.convolution_backward}
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}

_works: dict[Call, Work | None] = {}


class _Held(weakref.ref[torch.UntypedStorage]):
    """A storage that is counted. key: where torch has it. size: its bytes."""

    __slots__ = ("key", "size")
    key: int
    size: int


class CostCounter(TorchDispatchMode):
    """Inside this context, counts the memory of one kind of device in bytes, and the work by operators.

    live: memory that is held now. peak: the most that was held since the last `reset_peak`. flops: work so far.
    again: the part of `flops` that was computed a second time. operators: how often each work was done.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.flops = self.again = 0
        self.operators: Counter[Work] = Counter()
        self._held: dict[int, _Held] = {}
        self._runs_again = self._leaves_out = False

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._held or (size := storage.nbytes()) == 0:
                continue
            held = _Held(storage, self._release)
            held.key, held.size = key, size
            self._held[key] = held
            self.live += size
            self.peak = max(self.peak, self.live)

    def reset_peak(self) -> int:
        """Set `peak` back to `live`, and return it."""
        self.peak = self.live
        return self.live

    def tally(self) -> Tally:
        """The work so far: two of these subtracted are the work between them."""
        return Tally(dict(self.operators), self.flops, self.again)

    @contextmanager
    def count_again(self) -> Iterator[None]:
        """Inside it, work is done a second time, to save memory."""
        before, self._runs_again = self._runs_again, True
        try:
            yield
        finally:
            self._runs_again = before

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """Inside it, memory is counted, and work is not."""
        before, self._leaves_out = self._leaves_out, True
        try:
            yield
        finally:
            self._leaves_out = before

    def _release(self, held: _Held) -> None:
        del self._held[held.key]
        self.live -= held.size

    def add(
        self, call: Call | None, func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object], result: object
    ) -> None:
        if call in _works:
            work = _works[call]
        else:
            work = find_work(func, args, kwargs, result)
            if call is not None:
                _works[call] = work
        if work is not None and not self._leaves_out:
            self.flops += work.flops
            self.again += work.flops * self._runs_again
            self.operators[work] += 1
        self.hold([result] if isinstance(result, torch.Tensor) else list_tensors(result))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.add(None, func, args, kwargs or {}, result)
        return result


def find_work(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object], result: object) -> Work | None:
    """The work of one operator; None if it computes and moves nothing."""
    packet = func._overloadpacket
    count_flops = flop_registry.get(packet)
    flops = 0 if count_flops is None else int(count_flops(*args, **kwargs, out_val=result))
    if not flops and (func.is_view or packet in EMPTY):
        return None
    tensors = [*list_tensors((args, tuple(kwargs.values()))), *list_tensors(result)]
    if not tensors:
        return None
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    return Work(find_kind(packet, flops), dtype, flops, sum(map(count_bytes, tensors)))


def find_kind(packet: object, flops: int) -> Kind:
    """The kind of an operator with so many FLOPs."""
    if packet in PRODUCTS:
        return "product"
    if packet in CONVOLUTIONS:
        return "convolution"
    if not flops:
        return "elementwise"
    return "attention backward" if "backward" in str(packet) else "attention"


def count_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements; what is expanded lies in memory once."""
    own = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        own *= size if stride else min(size, 1)
    return own * tensor.element_size()
