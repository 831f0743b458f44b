"""The memory of a teacher's text encoders, counted on the meta device from their configuration, without weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from dmdr.config.inputs import Teacher
from dmdr.planning.architectures import ARCHITECTURES
from dmdr.planning.meta import find_configs
from dmdr.teacher import hub
from dmdr.teacher.index import read_index

HALF = ("float16", "bfloat16")


def count_text_bytes(teacher: Teacher) -> int:
    """Bytes of all text encoders of a config's teacher.

    A parameter takes 2 where they were published in half precision, which `half_storage.py` keeps, else 4.

    Raises:
        ConfigError, InputMissing, DataError: the teacher's configuration is not available.
    """
    address = hub.ADDRESS.fullmatch(teacher.path) if hub.is_hub(teacher.path) else None
    for architecture in ARCHITECTURES.values():
        if address and address["repo"] == architecture.hub:
            return architecture.text_bytes
    return _count_bytes(find_configs(teacher))


def _count_bytes(folder: Path) -> int:
    total = 0
    for name, part in read_index(folder).parts.items():
        if part is None or not name.startswith("text_encoder"):
            continue
        kind = getattr(transformers, part.class_name)
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            encoder = kind(kind.config_class.from_dict(config))
        width = 2 if config.get("dtype", config.get("torch_dtype")) in HALF else 4
        total += width * sum(parameter.numel() for parameter in encoder.parameters())
    return total
