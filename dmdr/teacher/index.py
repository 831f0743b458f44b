"""model_index.json: which pipeline a diffusers folder holds, and the class of each of its parts. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import DataError, InputMissing

FAMILIES = {  # class of the pipeline -> family
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z-image",
    "FluxPipeline": "flux",
}
TEXT_PARTS = ("text_encoder", "tokenizer")  # beginnings of their names


@dataclass(frozen=True)
class Part:
    """The class of a part, as model_index.json names it: ["diffusers", "AutoencoderKL"]."""

    library: str
    class_name: str


@dataclass(frozen=True)
class PipelineIndex:
    """model_index.json of a pipeline whose family DMDR knows.

    Attributes:
        class_name: of the pipeline.
        parts: by name; None for a part that the pipeline may have and this folder lacks, as SD3 may lack its T5.
    """

    class_name: str
    parts: dict[str, Part | None]

    @property
    def family(self) -> str:
        return FAMILIES[self.class_name]

    @property
    def text_parts(self) -> set[str]:
        """Names of the text encoders and tokenizers, absent ones included."""
        return {name for name in self.parts if name.startswith(TEXT_PARTS)}

    def require_part(self, name: str) -> Part:
        """The part of that name.

        Raises:
            DataError: the folder lacks it.
        """
        part = self.parts.get(name)
        if part is None:
            raise DataError(f"model_index.json of a {self.class_name} names no {name}; fetch the teacher again")
        return part


def read_index(folder: Path) -> PipelineIndex:
    """Read model_index.json of a teacher.

    Raises:
        DataError: it is not JSON, or DMDR does not know the pipeline's family.
        InputMissing: it cannot be read.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"teacher {folder}: model_index.json is not JSON ({error}); fetch the teacher again") from error
    except OSError as error:
        raise InputMissing(f"cannot read {error.filename}: {error.strerror}; let this user read it") from error
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise DataError(f"teacher {folder} is a {name}; DMDR knows {', '.join(FAMILIES)}")
    entries = {key: value for key, value in index.items() if isinstance(value, list)}  # the others are settings
    parts = {part: None if library is None else Part(library, kind) for part, (library, kind) in entries.items()}
    return PipelineIndex(name, parts)
