"""What the headers of a start's files say: the shapes of its tensors, whether it is a LoRA, and what its writer noted.

Headers are a few kilobytes. All that makes a start unfit is found in them, before its weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import DataError
from dmdr.teacher.start_files import KEY, StartSource
from dmdr.teacher.weight_files import refuse_foreign_tensors

LORA = ("lora_A", "lora_B", "lora_down", "lora_up", ".lora.")  # in the name of a LoRA's tensor
OTHER_ADAPTERS = re.compile(r"lokr_|hada_|oft_|dora_scale|lora_magnitude_vector|\.diff(_b)?$")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StartHeader:
    """shapes: of each tensor. metadata: of the files, what their writer noted."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def is_lora(self) -> bool:
        return is_lora(self.shapes)


def read_header(source: StartSource) -> StartHeader:
    """Read the headers of a start's files.

    Raises:
        DataError: a file is damaged, or holds quantised weights, those of a compiled network, or an adapter that is no
            LoRA.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for file in source.files:
        try:
            with safe_open(file, framework="pt") as header:
                metadata |= header.metadata() or {}
                names = list(header.keys())
                for name in names:
                    tensor = header.get_slice(name)
                    shapes[name] = tuple(tensor.get_shape())
                    _check_number(file, name, tensor.get_dtype())
        except SafetensorError as error:
            size = f"{file.stat().st_size:,} bytes"
            raise DataError(f"{KEY}: the file {file} is damaged ({error}; {size}); fetch the start again") from error
        _refuse_others(names, file)
    if not shapes:
        raise DataError(f"{KEY} {source.address} holds no tensor; fetch the start again")
    return StartHeader(shapes, metadata)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a LoRA."""
    return any(sign in name for name in names for sign in LORA)


def _check_number(file: Path, name: str, dtype: str) -> None:
    if dtype not in FLOATS:
        raise DataError(
            f"{KEY}: the file {file} has {name} as {dtype}: it is quantised; give the weights in bfloat16 or float16"
        )


def _refuse_others(names: list[str], file: Path) -> None:
    adapters = is_lora(names) and not any(".base_layer." in name for name in names)
    for name in names:
        if adapters and OTHER_ADAPTERS.search(name):
            raise DataError(
                f"{KEY}: the file {file} has the tensor {name}, which is not of a plain LoRA; merge it into its "
                "network, and give that"
            )
    if not adapters:
        refuse_foreign_tensors(names, file, what=f"{KEY}: the file")
