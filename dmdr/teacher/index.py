"""model_index.json: which pipeline a diffusers folder holds, and the class of each of its parts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import DataError
from dmdr.teacher.json_file import read_object

FAMILIES = {  # class of the pipeline -> family
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z-image",
    "FluxPipeline": "flux",
}
TEXT_PARTS = ("text_encoder", "tokenizer")  # beginnings of their names
LIBRARIES = ("diffusers", "transformers")  # whose classes a part may have; any other is code of its own
NETWORKS = {
    "sd3": ("transformer", "SD3Transformer2DModel"),
    "sdxl": ("unet", "UNet2DConditionModel"),
    "z-image": ("transformer", "ZImageTransformer2DModel"),
    "flux": ("transformer", "FluxTransformer2DModel"),
}
VAE = "AutoencoderKL"


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
        DataError: it is not JSON, DMDR does not know the pipeline's family, or a part has a class of its own.
        InputMissing: it cannot be read.
    """
    index = read_object(folder / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise DataError(f"teacher {folder} is a {_name_class(name)}; DMDR knows {', '.join(FAMILIES)}")
    entries = {key: value for key, value in index.items() if isinstance(value, list)}  # the others are settings
    found = PipelineIndex(name, {part: _read_part(folder, part, entry) for part, entry in entries.items()})
    network, expected = NETWORKS[found.family]
    for part, class_name in ((network, expected), ("vae", VAE)):
        if (given := found.require_part(part).class_name) != class_name:
            raise DataError(
                f"teacher {folder}: its {part} is a {given}, and DMDR distils a {name} whose {part} is a {class_name}"
            )
    return found


def _read_part(folder: Path, part: str, entry: list[object]) -> Part | None:
    """A part's class. Raises DataError if it is no class of a library that DMDR takes classes from."""
    if entry == [None, None]:
        return None
    if len(entry) != 2 or not all(isinstance(each, str) for each in entry):
        raise DataError(f"teacher {folder}: model_index.json says {entry!r} of {part}; fetch the teacher again")
    library, class_name = map(str, entry)
    if library not in LIBRARIES:
        raise DataError(
            f"teacher {folder}: its {part} is {library}.{class_name}, code of its own, which is never run; give a "
            f"teacher whose parts are of {' and '.join(LIBRARIES)}"
        )
    return Part(library, class_name)


def _name_class(name: object) -> str:
    """The name of a pipeline's class as model_index.json has it; a list names a module with code of its own first."""
    return str(name[-1]) if isinstance(name, list) and name else str(name)
