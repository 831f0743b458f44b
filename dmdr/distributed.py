"""Several processes (ranks) that train one model: who does what of a batch, and sums over all of them.

1. The batch is global: what is drawn for it does not depend on the number of ranks. Each rank takes a part of it, and a
   loss inside an update is the rank's part of the global mean, so that sums over the ranks are what one process has.
2. Gradients are summed once, after the backward pass, in few large messages. An update runs the networks several times
   and goes backward twice, which hooks on each forward (torch's DistributedDataParallel) do not allow for.
3. Without a group of processes everything here is the identity, at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dmdr.errors import ConfigError

LONGEST = timedelta(minutes=60)  # that the others wait for one rank: to load, to write a checkpoint
MESSAGE = 2**25  # elements that are summed at once


def join(device: str, local_rank: int) -> None:
    """Enter the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, on the GPU of this rank if on any.

    Raises:
        ConfigError: there is no GPU for this rank.
    """
    if device == "cuda":
        have = torch.cuda.device_count()
        if local_rank >= have:
            raise ConfigError(
                f"execution.processes is {local_rank + 1} or more, one a GPU, and this machine has {have}; set "
                f"execution.processes to {have}, and micro_batch_size or gradient_checkpointing if memory is short"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=LONGEST)


def leave() -> None:
    """Leave the group together with the others."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """For all ranks to come here."""
    if ranks() > 1:
        all_reduce_sum(torch.zeros(()))  # unlike barrier(), it needs no GPU


def split_evenly(count: int) -> slice:
    """Which of `count` things are this rank's: neighbours, as many as anybody else's or one fewer."""
    return slice(count * rank() // ranks(), count * (rank() + 1) // ranks())


def split_batches(mine: slice, count: int, most: int | None) -> list[slice]:
    """This rank's share of `count` things in parts of at most `most`, as many parts on every rank; None: in one."""
    number = 1 if most is None else -(-largest_share(count) // most)
    size = mine.stop - mine.start
    return [slice(mine.start + size * i // number, mine.start + size * (i + 1) // number) for i in range(number)]


def largest_share(count: int) -> int:
    """The most of `count` things that fall to one rank."""
    return -(-count // ranks())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, without a graph."""
    if ranks() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def all_reduce_sums(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over all ranks of scalars, in one message."""
    if ranks() == 1:
        return values
    return dict(zip(values, all_reduce_sum(torch.stack([value.detach() for value in values.values()])), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on some rank; all get the same answer."""
    return bool(all_reduce_sum(torch.tensor(float(flag))))


def all_gather(part: torch.Tensor) -> torch.Tensor:
    """The parts of all ranks, one after another along the first dimension; lengths may differ. No graph."""
    if ranks() == 1:
        return part
    lengths = torch.zeros(ranks(), dtype=torch.int64)
    lengths[rank()] = len(part)
    lengths = all_reduce_sum(lengths).tolist()
    padded = part.new_zeros(max(lengths), *part.shape[1:])
    padded[: len(part)] = part.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])


def all_reduce_in_place(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks; the same ones, in the same order, on each.

    Gradients of parameters that are split over the ranks were summed on the way.
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
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in message])
    torch._foreach_copy_(message, [part.view_as(tensor) for part, tensor in zip(parts, message, strict=True)])


def shard_network(
    network: torch.nn.Module, device: str, *, whole: set[torch.nn.Parameter], compute: torch.dtype = torch.float32
) -> None:
    """Split the rows of a network's parameters over the ranks, block by block, all but those that stay `whole` (FSDP2).

    Each block is gathered where it runs, as `compute`, and let go after it, so that what an optimizer or an EMA writes
    is seen next. Gradients are summed in float32, as everywhere here.
    """
    mesh = init_device_mesh(device, (ranks(),))
    blocks = [each for each in network.modules() if type(each).__name__ in network._no_split_modules]
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)  # times stay as they are
    for module in (*reversed(blocks), network):  # what lies inside another block comes first
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this rank's rows; all of them, where the tensor is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All rows; where they are split, all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def has_rows(tensor: torch.Tensor) -> bool:
    """Whether this rank writes rows of it to a checkpoint; what is not split, only the first does."""
    return local_shard(tensor).numel() > 0 if isinstance(tensor, DTensor) else rank() == 0


def copy_shard(tensor: torch.Tensor, found: torch.Tensor) -> None:
    """Copy this rank's rows out of a whole tensor; FSDP2 deals them out as torch.chunk does."""
    if isinstance(tensor, DTensor):
        rows = -(-len(found) // ranks())
        found = found[rank() * rows : (rank() + 1) * rows]
    local_shard(tensor).copy_(found)
