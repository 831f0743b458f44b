"""Load a teacher that is one .safetensors file in the layout that its family was published in (original_layout.py).

diffusers reads the file by the configuration of a folder, the parts, which also give what the file lacks. It does not
report a missing or a foreign tensor. We therefore first compare the file's header with what that configuration needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import DataError
from dmdr.teacher.index import PipelineIndex
from dmdr.teacher.scaled_weights import find_scales, list_weights, unscale_file
from dmdr.teacher.scheduler_config import read_settings
from dmdr.teacher.skeletons import build_skeleton
from dmdr.teacher.weight_files import check_markers, find_variant, refuse_foreign_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, StableDiffusion3Pipeline, StableDiffusionXLPipeline
    from transformers import PreTrainedModel, T5EncoderModel

    Model = ModelMixin | PreTrainedModel


@dataclass(frozen=True)
class SingleFile:
    """Where such a teacher lies."""

    file: Path
    parts: Path  # a diffusers folder of the same family


def load_single_file(
    source: SingleFile, index: PipelineIndex, left_out: Collection[str], given: Mapping[str, Model]
) -> DiffusionPipeline:
    """Load the pipeline in float32.

    Args:
        index: of source.parts.
        left_out: names of the parts that are not loaded.
        given: parts that are there already.

    Raises:
        DataError: the file is damaged, of another family, lacks a tensor or has one of another shape; or neither it nor
            source.parts has the weights of a part.
    """
    import diffusers
    import torch

    from dmdr.backbones.latent import silence_diffusers

    skeletons = _build_skeletons(index, source.parts, left_out)
    held = _find_held_parts(index.family, source, skeletons)
    overrides: dict[str, Model | None] = {**dict.fromkeys(left_out), **given}
    for part in skeletons.keys() - held - given.keys():
        if not any((source.parts / part).glob("*.safetensors")):
            raise DataError(
                f"neither the teacher {source.file} nor its teacher.parts {source.parts} has weights of the {part}; "
                "give parts that have them"
            )
        overrides[part] = skeletons[part].from_pretrained(
            source.parts / part, dtype=torch.float32, use_safetensors=True, variant=find_variant(source.parts, part)
        )
    kind: type[StableDiffusion3Pipeline] | type[StableDiffusionXLPipeline] = getattr(diffusers, index.class_name)
    with silence_diffusers(), unscale_file(source.file) as plain:
        pipe: DiffusionPipeline = kind.from_single_file(
            str(plain), config=str(source.parts), local_files_only=True, dtype=torch.float32, **overrides
        )
    if "text_encoder_3" in held:
        t5: T5EncoderModel = pipe.text_encoder_3
        t5.set_input_embeddings(t5.shared)  # diffusers leaves the two untied
        t5.eval()  # and the dropout on
    return pipe


def _build_skeletons(index: PipelineIndex, folder: Path, left_out: Collection[str]) -> dict[str, Model]:
    """The parts of the family's layout that are not left out, as the folder configures them, without weights."""
    from dmdr.teacher.original_layout import LAYOUTS

    names = LAYOUTS[index.family].keys() - set(left_out)
    return {name: build_skeleton(folder, name, index.require_part(name)) for name in names}


def _find_held_parts(family: str, source: SingleFile, skeletons: dict[str, Model]) -> set[str]:
    """Compare the file's header with what the parts need. Returns the names of the parts that the file holds.

    Raises:
        DataError: as `load_single_file`.
    """
    from dmdr.teacher.original_layout import LAYOUTS, T5_TIE, to_original

    file = source.file
    shapes = _read_shapes(file, read_settings(source.parts))
    layouts = LAYOUTS[family]
    held = {part for part in skeletons if any(key.startswith(layouts[part].prefix) for key in shapes)}
    needed = to_original(
        family, {part: {name: each.to("meta") for name, each in skeletons[part].state_dict().items()} for part in held}
    )
    network = next(iter(layouts))
    prefix = layouts[network].prefix
    if not any(key in shapes for key in needed if key.startswith(prefix)):
        raise DataError(
            f"teacher {file} is no {family} file: it has none of the tensors of its {network}, which begin with "
            f"{prefix}; give teacher.parts of the file's own family, which must be one of {', '.join(LAYOUTS)}"
        )
    missing = sorted(key for key in needed.keys() - shapes.keys() if not key.endswith(T5_TIE))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"teacher {file} lacks the tensor {missing[0]}{more}, which {source.parts} needs; fetch the file again, "
            "or give teacher.parts of exactly this model"
        )
    for key, weight in needed.items():
        if key in shapes and shapes[key] != tuple(weight.shape):
            raise DataError(
                f"teacher {file} has {key} of shape {shapes[key]}, but {source.parts} needs {tuple(weight.shape)}; "
                "give teacher.parts of exactly this model"
            )
    return held


def _read_shapes(file: Path, scheduler: dict[str, object]) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as header:
            names = list(header.keys())
            if find_scales(names):
                names = list_weights(names)
            refuse_foreign_tensors(names, file)
            check_markers(names, header.metadata() or {}, file, scheduler)
            return {name: tuple(header.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        size = f"{file.stat().st_size:,} bytes"
        raise DataError(f"teacher file {file} is damaged ({error}; {size}); fetch the teacher again") from error
