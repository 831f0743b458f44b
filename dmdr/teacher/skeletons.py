"""Networks without weights: their parameters lie on meta, what they compute for themselves is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.teacher.index import Part

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel


def build_skeleton(folder: Path, name: str, part: Part) -> ModelMixin | PreTrainedModel:
    """One part of a pipeline as the folder configures it."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():
        if part.library == "diffusers":
            model = getattr(diffusers, part.class_name)
            network: ModelMixin = model.from_config(model.load_config(folder, subfolder=name))
            return network
        kind = getattr(transformers, part.class_name)
        encoder: PreTrainedModel = kind(kind.config_class.from_pretrained(folder / name))
        return encoder


def copy_skeleton(network: ModelMixin) -> ModelMixin:
    """A network of the same settings, without adapters."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        skeleton: ModelMixin = type(network).from_config(network.config)  # type: ignore[attr-defined]  # of ConfigMixin
    return skeleton
