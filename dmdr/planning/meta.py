"""Builds a teacher on the meta device without its weights, and makes code on meta compute as a GPU would.

1. torch.autocast does nothing on meta. `Arithmetic` casts tensors by the rules of CUDA's autocast, so that the tensors
   that the backward pass needs have the same sizes as on a GPU.
2. On meta, attention falls back to a formula that keeps all attention weights. `Arithmetic` calls the fused kernel,
   which does not keep them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Self

import diffusers
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dmdr.backbones.protocol import Backbone
from dmdr.config.inputs import Teacher
from dmdr.planning.architectures import ARCHITECTURES, assemble_pipeline
from dmdr.teacher import hub
from dmdr.teacher.index import read_index
from dmdr.teacher.load import build_backbone, find_diffusers_folder
from dmdr.teacher.scheduler_config import check_scheduler

CONFIGS = ("model_index.json", "*/config.json", "scheduler/*.json")
LOWERED = (F.linear, F.conv1d, F.conv2d)  # autocast computes these in the lower precision
RAISED = (F.layer_norm, F.group_norm, F.rms_norm)  # autocast computes these in float32


def build_meta_backbone(teacher: Teacher) -> Backbone:
    """The teacher of a config on meta, without text encoders.

    A teacher in ARCHITECTURES needs no files. Of any other teacher on a hub, only the configuration is fetched.

    Raises:
        ConfigError, InputMissing, DataError: as `find_teacher`.
    """
    address = hub.ADDRESS.fullmatch(teacher.path) if hub.is_hub(teacher.path) else None
    for architecture in ARCHITECTURES.values():
        if address and address["repo"] == architecture.hub:
            return build_backbone(architecture.build_pipeline(), teacher.resolution)
    return build_from_configs(find_configs(teacher), teacher.resolution)


def find_configs(teacher: Teacher) -> Path:
    """The folder with the configuration from which a teacher is built; errors as for `build_meta_backbone`."""
    address, key = (teacher.path, "teacher.path") if teacher.parts is None else (teacher.parts, "teacher.parts")
    return hub.fetch(key, address, files=CONFIGS) if hub.is_hub(address) else find_diffusers_folder(key, address)


def build_from_configs(folder: Path, resolution: int | None = None) -> Backbone:
    """The teacher that a folder's configuration describes, on meta, without reading weights."""
    index = read_index(folder)
    check_scheduler(folder, index)
    name = "unet" if "unet" in index.parts else "transformer"
    parts = {}
    with torch.device("meta"):
        for part in (name, "vae"):
            kind = getattr(diffusers, index.require_part(part).class_name)
            parts[part] = kind.from_config(json.loads((folder / part / "config.json").read_text(encoding="utf-8")))
    scheduler = getattr(diffusers, index.require_part("scheduler").class_name).from_pretrained(
        folder, subfolder="scheduler"
    )
    pipe = assemble_pipeline(getattr(diffusers, index.class_name), parts[name], parts["vae"], scheduler)
    return build_backbone(pipe, resolution)


def _copy_without_dispatch(function: Callable[..., object]) -> Callable[..., object]:
    """A copy of a function of torch.nn.functional that runs its body at once. The original hands itself to a mode and
    then runs outside of it, so that the mode would not see the calls in the body."""
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


MULTI_HEAD_ATTENTION = _copy_without_dispatch(F.multi_head_attention_forward)


class Arithmetic(TorchFunctionMode):
    """Inside this context, networks compute in the dtype `compute` as under CUDA's autocast, and attention is fused.

    exempt: parameters of networks that run outside of autocast. again: a context in which blocks are computed again.
    """

    def __init__(
        self,
        compute: torch.dtype,
        exempt: Iterable[torch.nn.Parameter],
        *,
        again: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__()
        self.compute, self.exempt, self.again = compute, list(exempt), again
        self._exempt = {id(parameter) for parameter in self.exempt}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            with self:
                return MULTI_HEAD_ATTENTION(*args, **named)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **named)  # type: ignore[arg-type]  # torch gives every call as objects
        if self.compute != torch.float32:
            if func in LOWERED and id(args[1]) not in self._exempt:
                args, named = self.cast(args, named, self.compute)
            elif func in RAISED and isinstance(args[0], torch.Tensor) and args[0].dtype == self.compute:
                args, named = self.cast(args, named, torch.float32)
        return func(*args, **named)

    @staticmethod
    def cast(
        args: Sequence[object], named: dict[str, object], dtype: torch.dtype
    ) -> tuple[list[object], dict[str, object]]:
        """The arguments of a call with every floating-point tensor in `dtype`."""

        def to_dtype(value: object) -> object:
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float and isinstance(value, torch.Tensor) else value

        return [to_dtype(each) for each in args], {name: to_dtype(each) for name, each in named.items()}

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: object,
    ) -> torch.Tensor:
        """scaled_dot_product_attention by the fused kernel. options: scale and enable_gqa."""
        if self.compute in (query.dtype, key.dtype, value.dtype):
            query, key, value = (each.to(self.compute) for each in (query, key, value))
        if options.get("enable_gqa"):
            key, value = (each.expand(-1, query.shape[1], -1, -1) for each in (key[:, :1], value[:, :1]))
        if attn_mask is not None:
            bias = torch.empty((), dtype=query.dtype, device=query.device)
            attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        keeps_graph = torch.is_grad_enabled()
        scale = options.get("scale")
        return kernel(query, key, value, attn_mask, keeps_graph, dropout_p, is_causal, scale=scale)[0]

    def enclose(self, function: Callable[..., object]) -> Callable[..., object]:
        """A function that enters an equal context, for what the backward pass calls outside of this one."""

        def run_inside(*args: object) -> object:
            with self.build_equal():
                return function(*args)

        return run_inside

    def build_equal(self) -> Arithmetic:
        """An equal context, for what does not run inside this one."""
        return Arithmetic(self.compute, self.exempt, again=self.again)

    def recompute(self) -> AbstractContextManager[object]:
        """The context of a block that the backward pass, which does not run inside this one, computes again."""
        return _Recomputation(self)


class _Recomputation(ExitStack):
    """The context in which a block is computed again. It is entered once for each backward pass through the block."""

    def __init__(self, first: Arithmetic) -> None:
        super().__init__()
        self.first = first

    def __enter__(self) -> Self:
        self.enter_context(self.first.again())
        self.enter_context(self.first.build_equal())
        return super().__enter__()
