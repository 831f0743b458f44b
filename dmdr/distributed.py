"""Several processes (ranks) train one model: each rank's part of a batch, and sums over all ranks.

1. The batch is global: its draws do not depend on the number of ranks. Each rank takes a part of it, of trajectories
   that it rolled out, and a loss inside an update is the rank's part of the global mean, so the sum over the ranks is
   what one process would have.
2. Gradients are summed once, after the backward pass, in few large messages. An update runs the networks several times
   and goes backward twice, which torch's DistributedDataParallel, with hooks on each forward, does not allow.
3. Without a group of processes every function here returns its argument, at no cost.
4. `WAIT` tells another thread whether this rank waits for the others, which is no fault of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dmdr.config.deal import cut, share_evenly
from dmdr.errors import ConfigError

TIMEOUT = timedelta(minutes=60)  # how long the others wait for one rank: it may load, or write a checkpoint
MESSAGE = 2**25  # elements that are summed at once


class Wait:
    """Whether the main thread is in a call that needs the other ranks. Used as `with WAIT:` around such a call."""

    def __init__(self) -> None:
        self.calls = 0
        self._side: SideGroup | None = None  # of the thread that the main thread waits for

    def __bool__(self) -> bool:
        return self.calls > 0 or (self._side is not None and self._side.waits)

    @contextmanager
    def behind(self, side: SideGroup) -> Iterator[None]:
        """Inside, the main thread waits for the thread that uses `side`, and for other ranks while that one does."""
        self._side = side
        try:
            yield
        finally:
            self._side = None

    def __enter__(self) -> None:
        self.calls += 1

    def __exit__(self, *_: object) -> None:
        self.calls -= 1


WAIT = Wait()


class SideGroup:
    """The same ranks in a group of their own, for one thread of each: what these exchange has no order with the calls
    of the main threads. All ranks make it, and use it in the same order.

    waits: whether the thread is in such a call.
    """

    def __init__(self) -> None:
        self.waits = False
        self._group = None
        if ranks() > 1:
            with WAIT:
                self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def all_gather(self, row: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, (1, length) each and on the CPU, below each other."""
        if self._group is None:
            return row
        rows = [torch.empty_like(row) for _ in range(ranks())]
        self.waits = True
        try:
            dist.all_gather(rows, row, group=self._group)
        finally:
            self.waits = False
        return torch.cat(rows)


def join(device: str, local_rank: int) -> None:
    """Enter the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name; on CUDA, take the GPU of this rank.

    Raises:
        ConfigError: this rank has no GPU.
    """
    if device == "cuda":
        have = torch.cuda.device_count()
        if local_rank >= have:
            raise ConfigError(
                f"execution.processes is {local_rank + 1} or more, one a GPU, and this machine has {have}; set "
                f"execution.processes to {have}, and micro_batch_size or gradient_checkpointing if memory is short"
            )
        torch.cuda.set_device(local_rank)
    with WAIT:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)


def leave() -> None:
    """Leave the group together with the others."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def ranks() -> int:
    """How many there are; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this process is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every rank is here."""
    if ranks() > 1:
        all_reduce_sum(torch.zeros(()))  # torch's own barrier() would need a GPU


def split_evenly(count: int) -> slice:
    """This rank's share of `count` things: neighbours, as many as any other rank has or one fewer."""
    mine = share_evenly(count, ranks(), rank())
    return slice(mine.start, mine.stop)


def split_batches(mine: slice, count: int, most: int | None) -> list[slice]:
    """Cut this rank's share `mine` of `count` things into parts of at most `most`, equally many parts on every rank.

    most: None for one part.
    """
    return cut(mine, 1 if most is None else -(-largest_share(count) // most))


def largest_share(count: int) -> int:
    """The largest share of `count` things that one rank has."""
    return -(-count // ranks())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, without a graph."""
    if ranks() == 1:
        return value
    value = value.detach().clone()
    with WAIT:
        dist.all_reduce(value)
    return value


def all_reduce_sums(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum scalars over all ranks, in one message."""
    if ranks() == 1:
        return values
    return dict(zip(values, all_reduce_sum(torch.stack([value.detach() for value in values.values()])), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; every rank gets the same answer."""
    return bool(all_reduce_sum(torch.tensor(float(flag))))


def all_gather(part: torch.Tensor) -> torch.Tensor:
    """Join the parts of all ranks along the first dimension; lengths may differ. No graph."""
    if ranks() == 1:
        return part
    own_length = torch.zeros(ranks(), dtype=torch.int64)
    own_length[rank()] = len(part)
    return _join(part, all_reduce_sum(own_length).tolist())


def all_gather_shares(part: torch.Tensor, count: int) -> torch.Tensor:
    """Join the even shares of `count` rows that the ranks have. As `all_gather`, but nobody asks for the lengths."""
    return part if ranks() == 1 else _join(part, [len(share_evenly(count, ranks(), each)) for each in range(ranks())])


def _join(part: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    padded = part.new_zeros(max(lengths), *part.shape[1:])
    padded[: len(part)] = part.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    with WAIT:
        dist.all_gather(parts, padded)
    return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])


def all_reduce_in_place(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks. Every rank passes the same tensors in the same order.

    Sharded tensors are left alone: FSDP2 has summed their gradients already.
    """
    if ranks() == 1:
        return
    message: list[torch.Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            continue
        if message and sum(map(torch.Tensor.numel, message)) + tensor.numel() > MESSAGE:
            _all_reduce(message)
            message = []
        message.append(tensor)
    if message:
        _all_reduce(message)


def _all_reduce(message: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in message])
    with WAIT:
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in message])
    torch._foreach_copy_(message, [part.view_as(tensor) for part, tensor in zip(parts, message, strict=True)])


def shard_network(
    network: torch.nn.Module,
    device: str,
    *,
    whole: set[torch.nn.Parameter],
    group: int | None = None,
    compute: torch.dtype = torch.float32,
) -> None:
    """Shard the rows of a network's parameters over the ranks, block by block (FSDP2); those in `whole` stay whole.

    Each block is gathered in `compute` when it runs and freed after it, so the next run sees what an optimizer or an
    EMA wrote. Gradients are summed in float32, as everywhere here.

    The values of all parameters and buffers are those of the first rank; on the others they may lie on meta.

    group: how many neighbours share the rows; every such group has all of them (HSDP). None: all ranks.
    """
    sharers = group or ranks()
    with WAIT:
        mesh = init_device_mesh(device, (ranks(),))
        if sharers < ranks():
            mesh = init_device_mesh(device, (ranks() // sharers, sharers), mesh_dim_names=("groups", "rows"))
    values = {name: tensor.detach() for name, tensor in _list_tensors(network)}
    blocks = list_blocks(network)
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)  # timesteps stay float32
    for module in (*reversed(blocks), network):  # an inner block before the one around it
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    if any(value.is_meta for value in values.values()):
        values = {}
        network.to_empty(device=device)
    else:
        for parameter in whole:
            parameter.data = parameter.data.to(device)
    for name, tensor in _list_tensors(network):
        value = values.pop(name) if values else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        value = value.to(device).contiguous()
        with WAIT:
            dist.broadcast(value, 0)
        copy_shard(tensor, value)


def _list_tensors(network: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and the buffers of a network, in the same order on each rank."""
    return [*network.named_parameters(), *network.named_buffers()]


def list_blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a network that its library names as units, outer ones before inner ones."""
    assert isinstance(network, ModelMixin), type(network)
    return [module for module in network.modules() if type(module).__name__ in (network._no_split_modules or ())]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank holds only its rows of the tensor."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this rank's rows; of the whole tensor where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All rows. Every rank has to call this for a sharded tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    with WAIT:
        return tensor.full_tensor()


def has_rows(tensor: torch.Tensor) -> bool:
    """Whether this rank writes the tensor, or its rows, to a checkpoint; the first writes what is not sharded, and of
    groups that have the same rows, the first does."""
    if not isinstance(tensor, DTensor):
        return rank() == 0
    places = enumerate(tensor.placements)
    is_first = all(tensor.device_mesh.get_local_rank(level) == 0 for level, each in places if each.is_replicate())
    return is_first and local_shard(tensor).numel() > 0


@torch.no_grad()
def copy_shard(tensor: torch.Tensor, source: torch.Tensor) -> None:
    """Copy this rank's rows of a whole tensor; FSDP2 deals rows out as torch.chunk does."""
    if isinstance(tensor, DTensor):
        (level,) = (level for level, each in enumerate(tensor.placements) if each.is_shard())
        number, sharers = tensor.device_mesh.get_local_rank(level), tensor.device_mesh.size(level)
        rows = -(-len(source) // sharers)
        source = source[number * rows : (number + 1) * rows]
    local_shard(tensor).copy_(source)
