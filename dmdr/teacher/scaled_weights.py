"""8-bit weights with a scale beside each, as ComfyUI's files have them: weight = values in 8 bits x scale.

1. The scale of `layer.weight` is `layer.scale_weight` or `layer.weight_scale`, one number. The scales of inputs are for
   8-bit products only, and change nothing here.
2. `scaled_fp8` or `layer.comfy_quant` says that a file is such a one. Other formats of comfy_quant are refused.
3. diffusers reads such a file as if it had no scales. It is therefore given a file with the weights themselves.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr.errors import DataError

if TYPE_CHECKING:
    import torch

SCALES = (".scale_weight", ".weight_scale")
OF_INPUTS = (".scale_input", ".input_scale")
MARKER, FORMAT = "scaled_fp8", ".comfy_quant"
BESIDE = (*SCALES, *OF_INPUTS, MARKER, FORMAT)  # ends of the names of all that is no weight
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def list_weights(names: Iterable[str]) -> list[str]:
    """The names without scales and markers."""
    return [name for name in names if not name.endswith(BESIDE)]


def find_scales(names: Iterable[str]) -> dict[str, str]:
    """Name of a weight -> name of its scale."""
    return {f"{name.removesuffix(end)}.weight": name for name in names for end in SCALES if name.endswith(end)}


@contextmanager
def unscale_file(file: Path) -> Iterator[Path]:
    """The file itself; or if it has scales, a file beside the temporary ones with the weights, deleted at the end.

    Raises:
        DataError: it is damaged, or in an 8-bit format that DMDR does not read.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    try:
        with safe_open(file, framework="pt") as header:
            names, metadata = list(header.keys()), header.metadata()
        if not find_scales(names):
            yield file
            return
        tensors = unscale(load_file(file), file)
    except SafetensorError as error:
        raise DataError(f"teacher file {file} is damaged ({error}); fetch the teacher again") from error
    with tempfile.TemporaryDirectory(prefix="dmdr-") as folder:
        plain = Path(folder, file.name)
        save_file(tensors, plain, metadata)
        del tensors
        yield plain


def unscale(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """The weights of a file in float32 where they have a scale, and as they are elsewhere.

    Raises:
        DataError: a scale is not one number, has no 8-bit weight, or is of a format that DMDR does not read.
    """
    import torch

    for name in tensors:
        if name.endswith(FORMAT):
            _check_format(bytes(tensors[name].to(torch.uint8).flatten().tolist()), name, file)
    weights, scales = {name: tensors[name] for name in list_weights(tensors)}, find_scales(tensors)
    for name, scale in scales.items():
        weight = weights.get(name)
        if weight is None or weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            found = "is not there" if weight is None else f"is {weight.dtype}"
            raise DataError(f"teacher file {file} has {scale}, but {name} {found}; give the weights in bfloat16")
        if tensors[scale].numel() != 1:
            raise DataError(
                f"teacher file {file} has {scale} of shape {tuple(tensors[scale].shape)}; DMDR reads 8-bit weights "
                "with one scale each: give the weights in bfloat16"
            )
        weights[name] = weight.float() * tensors[scale].float().reshape(())
    return weights


def _check_format(data: bytes, name: str, file: Path) -> None:
    try:
        found = json.loads(data).get("format")
    except (ValueError, AttributeError, RecursionError):
        found = "unknown"
    if found not in FORMATS:
        raise DataError(
            f"teacher file {file} has weights in the format {str(found)[:40]!r} ({name}); DMDR reads "
            f"{' and '.join(FORMATS)}: give the weights in bfloat16"
        )
