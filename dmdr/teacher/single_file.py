"""A teacher that is one .safetensors file in the layout that its family was published in (original_layout.py).

diffusers reads it by the configuration of a folder, the parts, which also give what the file lacks. It does not say
when a tensor is missing or foreign, so that the file's header is compared first with what that configuration needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dmdr.errors import DataError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


class SingleFile(NamedTuple):
    """Where such a teacher lies."""

    file: Path
    parts: Path  # a diffusers folder of the same family


def load_single_file(kind: type[DiffusionPipeline], family: str, source: SingleFile, given: dict) -> DiffusionPipeline:
    """The pipeline in float32; `given` components are taken as they are, None stays away.

    Raises:
        DataError: the file is damaged, of another family, lacks a tensor or has one of another shape; or neither it nor
            the parts have a component.
    """
    import torch

    from dmdr.backbones.latent import unheard

    parts = _build_skeletons(kind, family, source.parts, given)
    held = _check_keys(family, source, parts)
    for part in parts.keys() - held:
        if not any((source.parts / part).glob("*.safetensors")):
            raise DataError(
                f"teacher {source.file} has no {part} and its teacher.parts {source.parts} neither; give parts that do"
            )
        given = {**given, part: parts[part].from_pretrained(source.parts / part, dtype=torch.float32)}
    with unheard():
        pipe = kind.from_single_file(
            str(source.file), config=str(source.parts), local_files_only=True, dtype=torch.float32, **given
        )
    if "text_encoder_3" in held:
        pipe.text_encoder_3.set_input_embeddings(pipe.text_encoder_3.shared)  # diffusers leaves the two untied,
        pipe.text_encoder_3.eval()  # and its dropout on
    return pipe


def _build_skeletons(
    kind: type[DiffusionPipeline], family: str, folder: Path, given: dict
) -> dict[str, torch.nn.Module]:
    """The parts of the family's layout that are not given, as the folder configures them, without their weights."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    from dmdr.teacher.original_layout import LAYOUTS

    index, found = kind.load_config(folder), {}
    with init_empty_weights():
        for part in LAYOUTS[family].keys() - given.keys():
            library, name = index[part]
            if library == "diffusers":
                model = getattr(diffusers, name)
                found[part] = model.from_config(model.load_config(folder, subfolder=part))
            else:
                model = getattr(transformers, name)
                found[part] = model(model.config_class.from_pretrained(folder / part))
    return found


def _check_keys(family: str, source: SingleFile, parts: dict[str, torch.nn.Module]) -> set[str]:
    """Which of the parts the file holds; its header is compared with what they need.

    Raises:
        DataError: as `loaded` says.
    """
    from safetensors import SafetensorError, safe_open

    from dmdr.teacher.original_layout import LAYOUTS, T5_TIE, to_original

    file = source.file
    try:
        with safe_open(file, framework="pt") as header:
            shapes = {key: tuple(header.get_slice(key).get_shape()) for key in header.keys()}  # noqa: SIM118
    except SafetensorError as error:
        found = f"{file.stat().st_size:,} bytes"
        raise DataError(f"teacher file {file} is damaged ({error}; {found}); fetch the teacher again") from error
    held = {part for part in parts if any(key.startswith(LAYOUTS[family][part][0]) for key in shapes)}
    network = next(iter(LAYOUTS[family]))
    weights = {part: {name: each.to("meta") for name, each in parts[part].state_dict().items()} for part in parts}
    needed = to_original(family, {part: weights[part] for part in held})
    prefix = LAYOUTS[family][network][0]
    if not any(key in shapes for key in needed if key.startswith(prefix)):
        raise DataError(
            f"teacher {file} is no {family} file: it has none of the tensors of its {network}, which begin with "
            f"{prefix}; give teacher.parts of the file's own family, which must be one of {', '.join(LAYOUTS)}"
        )
    lost = sorted(key for key in needed.keys() - shapes.keys() if not key.endswith(T5_TIE))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DataError(
            f"teacher {file} lacks the tensor {lost[0]}{more}, which {source.parts} configures; fetch the file again, "
            "or give teacher.parts of this very model"
        )
    for key, weight in needed.items():
        if key in shapes and shapes[key] != tuple(weight.shape):
            raise DataError(
                f"teacher {file} has {key} of shape {shapes[key]}, {source.parts} asks for {tuple(weight.shape)}; give "
                "teacher.parts of this very model"
            )
    return held
