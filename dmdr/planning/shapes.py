"""Remembers the shapes that operators return on the meta device, so that torch works each of them out only once.

torch computes these shapes in Python, which takes a few tenths of a millisecond a call, and the blocks of a network
repeat the same calls many times. We remember two kinds of operators: those that return new tensors, and those that
change their first argument in place, which on meta do nothing but check the shapes. torch itself still makes all views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Effect(Enum):
    """What an operator does with memory, by its schema."""

    NEW = "returns new tensors"
    IN_PLACE = "changes its first argument and returns it"
    OTHER = "anything else"


class Shape(NamedTuple):
    """Everything that describes a tensor on meta that has memory of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


class Call(NamedTuple):
    """An operator and the description of its arguments. Equal calls return equal shapes."""

    operator: OpOverload
    args: object
    kwargs: object


Replay = Callable[[Sequence[object]], object]  # takes a call's arguments and returns what torch would return

_replays: dict[Call, Replay | None] = {}  # None: torch has to run this call each time
_effects: dict[OpOverload, Effect] = {}


class Counter(Protocol):
    """What counts operators beside this context."""

    def add(
        self, call: Call | None, func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object], result: object
    ) -> None:
        """Count one operator. call: its description; equal ones are the same work. None: it has none."""


class KnownShapes(TorchDispatchMode):
    """Inside this context, operators on meta tensors are remembered until the process ends.

    counter: counts them all, in the same call from torch: a context of its own would take as long again. Any other
    counter that should see the remembered operators, too, must be entered after this context.
    """

    def __init__(self, counter: Counter | None = None) -> None:
        super().__init__()
        self.counter = counter

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes longer than the rest

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        call = _describe_call(func, args, kwargs)
        replay = None if call is None else _replays.get(call)
        if replay is not None:
            result = replay(args)
        else:
            result = func(*args, **kwargs)
            if call is not None and call not in _replays:
                _replays[call] = _build_replay(call, result, args, kwargs)
        if self.counter is not None:
            self.counter.add(call, func, args, kwargs, result)
        return result


def _find_effect(operator: OpOverload) -> Effect:
    effect = _effects.get(operator)
    if effect is None:
        schema = operator._schema
        written = [each.alias_info is not None and each.alias_info.is_write for each in schema.arguments]
        if schema.returns and not schema.is_mutable and not any(each.alias_info for each in schema.returns):
            effect = Effect.NEW
        elif written[:1] == [True] and sum(written) == len(schema.returns) == 1 and schema.returns[0].alias_info:
            effect = Effect.IN_PLACE
        else:
            effect = Effect.OTHER
        _effects[operator] = effect
    return effect


def _describe_call(operator: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> Call | None:
    """The call as a key, or None if its result may depend on more than the description of its arguments."""
    if _find_effect(operator) is Effect.OTHER:
        return None
    try:
        call = Call(operator, _describe(args), tuple((name, _describe(value)) for name, value in kwargs.items()))
        hash(call)
    except TypeError:
        return None
    return call


def _describe(value: object) -> object:
    """An argument as a part of a key.

    Raises:
        TypeError: the argument is a tensor with numbers, or a subclass of a tensor.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_meta or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"a {type(value).__name__} on {value.device} has more to it than its shape")
        return value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
    if isinstance(value, (tuple, list)):
        return type(value), *map(_describe, value)
    return type(value), value  # the type as well, because 1, 1.0 and True are equal


def _build_replay(call: Call, result: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Replay | None:
    """A function that repeats this call's result.

    None if the result is not what the operator's schema promised, or is more than plain tensors.
    """
    if _find_effect(call.operator) is Effect.IN_PLACE:
        unchanged = result is args[0] and _describe(args) == call.args
        return (lambda arguments: arguments[0]) if unchanged else None
    inputs = [*list_tensors((args, tuple(kwargs.values())))]
    if isinstance(result, torch.Tensor):
        if not _is_plain(result) or not _have_own_memory([result], inputs):
            return None
        shape = Shape.of(result)
        return lambda _: shape.empty()
    if not isinstance(result, (tuple, list)) or type(result) not in (tuple, list):
        return None
    tensors = [each for each in result if each is not None]
    if not all(_is_plain(each) for each in tensors) or not _have_own_memory(tensors, inputs):
        return None
    kind, shapes = type(result), [None if each is None else Shape.of(each) for each in result]
    return lambda _: kind([None if each is None else each.empty() for each in shapes])


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor on meta that its `Shape` describes completely."""
    if type(value) is not torch.Tensor or value.device.type != "meta" or value.is_conj() or value.is_neg():
        return False
    return value.untyped_storage().nbytes() == Shape.of(value).empty().untyped_storage().nbytes()


def _have_own_memory(tensors: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor]) -> bool:
    """Whether no two of the tensors share memory, and none shares memory with an input.

    Some operators return a view although their schema does not say so.
    """
    storages = [each.untyped_storage()._cdata for each in tensors]
    return len({*storages} - {each.untyped_storage()._cdata for each in inputs}) == len(storages)


def list_tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors in a value of nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from list_tensors(part)
