"""Round a student to the precision of its files, and tell what the rounding changes.

1. The student is rounded before a form is compared with it. So the comparison is as strict for bfloat16 as for float32:
   the form holds the very numbers that our sampler draws with, and no tolerance is widened.
2. What a form takes from the teacher is not rounded: the network under a LoRA, and all but the network of `weights`.
3. Only what files hold is rounded. Tables that a network computes anew when it is loaded keep their float32 values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from dmdr.backbones.latent import silence_diffusers
from dmdr.backbones.protocol import Backbone
from dmdr.config.forms import Dtype, Form
from dmdr.errors import DataError
from dmdr.teacher.key_map import Weights

DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The order in which forms are written. Each takes at least as many rounded parts as the one before.
WRITING_ORDER: tuple[Form, ...] = ("lora", "weights", "pipeline", "single-file")


def cast_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights in the precision of their file; integers stay.

    Raises:
        DataError: a weight is too large for it.
    """
    return {name: _cast(name, weight, dtype).contiguous() for name, weight in weights.items()}


def check_dtype(backbone: Backbone, dtype: torch.dtype) -> None:
    """Check early that the teacher's weights, which a student stays near, are not too large for its files.

    Raises:
        DataError: one is.
    """
    for module in list_modules(backbone.pipe):
        for name, weight in module.state_dict().items():
            _cast(name, weight, dtype)


@torch.no_grad()
def round_parts(backbone: Backbone, form: Form, dtype: torch.dtype) -> None:
    """Round the parts that a form holds, in place; they stay float32.

    Raises:
        DataError: a weight is too large for `dtype`.
    """
    if form == "lora":
        return
    modules = [backbone.network] if form == "weights" else list_modules(backbone.pipe)
    for module in modules:
        for name, weight in module.state_dict().items():  # shares its memory with the module
            weight.copy_(_cast(name, weight, dtype))


@contextmanager
def hold_in(pipe: DiffusionPipeline, dtype: torch.dtype) -> Iterator[None]:
    """Let a pipeline's rounded parts have the dtype of their files, as `save_pretrained` writes what it finds."""
    modules = list_modules(pipe)
    tables = [(owner, name, table) for module in modules for owner, name, table in _list_tables(module)]
    _move_all(modules, dtype)
    try:
        yield
    finally:
        _move_all(modules, torch.float32)
        for owner, name, table in tables:
            owner.register_buffer(name, table, persistent=False)


def _move_all(modules: list[torch.nn.Module], dtype: torch.dtype) -> None:
    with silence_diffusers():  # it warns of modules that must stay float32, also where there are none
        for module in modules:
            module.to(dtype)


def list_modules(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    """The networks, encoders and autoencoders of a pipeline."""
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _list_tables(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.Tensor]]:
    """The buffers that no file holds, as rotary frequencies, with their owners and names."""
    held = module.state_dict().keys()
    return [
        (owner, name, table)
        for path, owner in module.named_modules()
        for name, table in owner.named_buffers(recurse=False)
        if f"{path}.{name}".lstrip(".") not in held
    ]


def _cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not weight.is_floating_point():
        return weight
    cast = weight.to(dtype)
    if not weight.is_meta and not cast.isfinite().all():
        raise DataError(
            f"{name} holds {weight.abs().max().item():.3g}, which export.dtype {str(dtype).removeprefix('torch.')} "
            "cannot hold; set bfloat16 or float32"
        )
    return cast
