"""Whole runs on the meta device, where tensors have shapes and no numbers: a teacher that nobody has to fetch, and the
arithmetic that a GPU would do.

1. torch.autocast does nothing on meta. `arithmetic` casts what CUDA's autocast would, by the same rules, so that the
   tensors kept for a backward pass have the sizes that they have on a GPU.
2. On meta, attention falls back to the formula that keeps every weight; `arithmetic` takes the fused kernel's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F

from dmdr.backbones.protocol import Backbone
from dmdr.config.run import Teacher
from dmdr.planning.architectures import ARCHITECTURES, assemble_pipeline
from dmdr.teacher import hub
from dmdr.teacher.index import read_index
from dmdr.teacher.load import build_backbone, find_diffusers_folder

CONFIGS = ("model_index.json", "*/config.json", "scheduler/*.json")
LOWER = ("linear", "conv1d", "conv2d")  # what autocast computes in the lower precision
RAISED = ("layer_norm", "group_norm", "rms_norm")  # and in float32


def build_meta_backbone(asked: Teacher) -> Backbone:
    """The teacher of a config without weights and without text encoders.

    Of a published one nothing is fetched; of another on a hub, its configuration.

    Raises:
        ConfigError, InputMissing, DataError: as `teacher.resolve`.
    """
    published = hub.is_hub(asked.path) and hub.ADDRESS.fullmatch(asked.path)
    for each in ARCHITECTURES.values():
        if published and published["repo"] == each.hub:
            return build_backbone(each.pipe(), asked.resolution)
    return build_from_configs(find_configs(asked), asked.resolution)


def find_configs(asked: Teacher) -> Path:
    """The folder that tells how a teacher is built."""
    address, key = (asked.path, "teacher.path") if asked.parts is None else (asked.parts, "teacher.parts")
    return hub.fetch(key, address, files=CONFIGS) if hub.is_hub(address) else find_diffusers_folder(key, address)


def build_from_configs(folder: Path, resolution: int | None = None) -> Backbone:
    """A teacher's pipeline from the configuration in its folder alone."""
    index = read_index(folder)
    name = "unet" if "unet" in index.parts else "transformer"
    made = {}
    with torch.device("meta"):
        for part in (name, "vae"):
            kind = getattr(diffusers, index.require_part(part).class_name)
            made[part] = kind.from_config(json.loads((folder / part / "config.json").read_text(encoding="utf-8")))
    scheduler = getattr(diffusers, index.require_part("scheduler").class_name).from_pretrained(
        folder, subfolder="scheduler"
    )
    pipe = assemble_pipeline(getattr(diffusers, index.class_name), made[name], made["vae"], scheduler)
    return build_backbone(pipe, resolution)


@contextmanager
def count_arithmetic(compute: torch.dtype, spared: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside it, networks compute in `compute` as under CUDA's autocast, all but those with the parameters `spared`,
    which are run outside of it; attention is the fused kernel's.

    It replaces functions of torch.nn.functional, because a backward pass that recomputes activations leaves every mode.
    """
    apart = {id(parameter) for parameter in spared}

    def cast(values: tuple, dtype: torch.dtype) -> list:
        return [
            each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in values
        ]

    def lower(function: Callable) -> Callable:
        def called(x: torch.Tensor, weight: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
            if compute != torch.float32 and id(weight) not in apart:
                x, weight, *rest = cast((x, weight, *rest), compute)
                named = dict(zip(named, cast(tuple(named.values()), compute), strict=True))
            return function(x, weight, *rest, **named)

        return called

    def raised(function: Callable) -> Callable:
        def called(x: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
            if compute != torch.float32 and x.dtype == compute:
                x, *rest = cast((x, *rest), torch.float32)
                named = dict(zip(named, cast(tuple(named.values()), torch.float32), strict=True))
            return function(x, *rest, **named)

        return called

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if compute in (query.dtype, key.dtype, value.dtype):
            query, key, value = cast((query, key, value), compute)
        if enable_gqa:
            key, value = (each.expand(-1, query.shape[1], -1, -1) for each in (key[:, :1], value[:, :1]))
        if attn_mask is not None:
            bias = torch.empty((), dtype=query.dtype, device=query.device)
            attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]

    with ExitStack() as replaced:
        for name in LOWER:
            replaced.enter_context(patch.object(F, name, lower(getattr(F, name))))
        for name in RAISED:
            replaced.enter_context(patch.object(F, name, raised(getattr(F, name))))
        replaced.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        yield
