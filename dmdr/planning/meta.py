"""Whole runs on the meta device, where tensors have shapes and no numbers: a teacher that nobody has to fetch, and the
arithmetic that a GPU would do.

1. torch.autocast does nothing on meta. `Arithmetic` casts what CUDA's autocast would, by the same rules, so that the
   tensors kept for a backward pass have the sizes that they have on a GPU.
2. On meta, attention falls back to the formula that keeps every weight; `Arithmetic` takes the fused kernel's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from dmdr.backbones.protocol import Backbone
from dmdr.config.run import Teacher
from dmdr.planning.architectures import ARCHITECTURES, assemble_pipeline
from dmdr.teacher import hub
from dmdr.teacher.index import read_index
from dmdr.teacher.load import build_backbone, find_diffusers_folder

CONFIGS = ("model_index.json", "*/config.json", "scheduler/*.json")
LOWERED = (F.linear, F.conv1d, F.conv2d)  # what autocast computes in the lower precision
RAISED = (F.layer_norm, F.group_norm, F.rms_norm)  # and in float32


def build_meta_backbone(teacher: Teacher) -> Backbone:
    """The teacher of a config without weights and without text encoders.

    Nothing is fetched for a published one; for any other on a hub, only its configuration.

    Raises:
        ConfigError, InputMissing, DataError: as `find_teacher`.
    """
    published = hub.is_hub(teacher.path) and hub.ADDRESS.fullmatch(teacher.path)
    for each in ARCHITECTURES.values():
        if published and published["repo"] == each.hub:
            return build_backbone(each.build_pipeline(), teacher.resolution)
    return build_from_configs(find_configs(teacher), teacher.resolution)


def find_configs(teacher: Teacher) -> Path:
    """The folder whose configuration says how a teacher is built."""
    address, key = (teacher.path, "teacher.path") if teacher.parts is None else (teacher.parts, "teacher.parts")
    return hub.fetch(key, address, files=CONFIGS) if hub.is_hub(address) else find_diffusers_folder(key, address)


def build_from_configs(folder: Path, resolution: int | None = None) -> Backbone:
    """A teacher's pipeline from the configuration in its folder alone."""
    index = read_index(folder)
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


class Arithmetic(TorchFunctionMode):
    """Inside it, networks compute in `compute` as under CUDA's autocast, and attention is the fused kernel's.

    spared: parameters of networks that run outside of autocast.
    """

    def __init__(self, compute: torch.dtype, spared: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.compute, self.spared = compute, list(spared)
        self._spared = {id(parameter) for parameter in self.spared}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **named)  # type: ignore[arg-type]  # torch gives every call as objects
        if self.compute != torch.float32:
            if func in LOWERED and id(args[1]) not in self._spared:
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
        """scaled_dot_product_attention by the fused kernel, which keeps no weights. options: scale and enable_gqa."""
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

    def recompute(self, module: torch.nn.Module, *args: object) -> object:
        """Run a block whose backward pass runs it again, in the same arithmetic: a backward pass leaves this mode."""
        again = Arithmetic(self.compute, self.spared)
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
