"""Finding, fingerprinting and loading a teacher: a diffusers folder, a revision on a hub, one of the lab's, a file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from dmdr.config.run import Teacher
from dmdr.errors import DataError, InputMissing
from dmdr.teacher import digests, hub
from dmdr.teacher.single_file import SingleFile

FAMILIES = {  # class of the pipeline -> family
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z-image",
    "FluxPipeline": "flux",
}
ONE_FILE = ("sd3", "sdxl")  # the families of dmdr/teacher/original_layout.py
LAB = Path(__file__).parents[1] / "lab" / "teachers"
PIPELINE_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors")
OTHER_FORMS = ("*.fp16.*", "*/*.non_ema.*", "*/flax_*", "*/openvino_*")  # of the same weights, in many repositories


def find_teacher(path: str, parts: str | None = None) -> Path | SingleFile:
    """What is behind a config's teacher.path: a folder, "lab:NAME" of the lab, "hub:OWNER/NAME@COMMIT", or with
    teacher.parts a .safetensors file.

    What a hub has is fetched into its library's cache (HF_HOME) once; the pinned commit is the same teacher for ever.

    Raises:
        ConfigError: a hub's teacher is not pinned to a commit.
        InputMissing: no such folder or file, one that cannot be read, or the hub does not give it.
        DataError: the folder is not a diffusers pipeline, or one of a family that has no files of this kind.
    """
    if parts is None:
        return find_diffusers_folder("teacher.path", path)
    if not os.path.isfile(path):
        raise InputMissing(f"teacher.path {path}: no such file; give a .safetensors file, or a folder without parts")
    source = SingleFile(Path(path), find_diffusers_folder("teacher.parts", parts))
    if family_of(source) not in ONE_FILE:
        raise DataError(
            f"teacher.parts {parts} is of the family {family_of(source)}; a teacher in one file is one of "
            f"{', '.join(ONE_FILE)}: give a diffusers folder as teacher.path"
        )
    return source


def find_teacher_of(asked: Teacher) -> Path | SingleFile:
    """`resolve` of a config's section."""
    return find_teacher(asked.path, asked.parts)


def find_diffusers_folder(key: str, path: str) -> Path:
    """`resolve` of a pipeline; `key` of the config is for complaints."""
    if hub.is_hub(path):
        folder = hub.fetch(key, path, files=PIPELINE_FILES, but=OTHER_FORMS)
    else:
        folder = LAB / path.removeprefix("lab:") if path.startswith("lab:") else Path(path)
    if not os.path.isdir(folder):
        have = ", ".join(sorted(f"lab:{each.name}" for each in LAB.iterdir())) if LAB.is_dir() else "none"
        raise InputMissing(f"{key} {path}: no such folder; give a diffusers folder or one of the lab's: {have}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputMissing(f"{key} {path}: this user may not read {folder}; change its permissions, or give another")
    if not (folder / "model_index.json").is_file():
        raise DataError(f"{key} {path} has no model_index.json; save the pipeline there with save_pretrained")
    return folder


def family_of(source: Path | SingleFile) -> str:
    """The family of a teacher, by its index.

    Raises:
        DataError: one that DMDR does not know.
    """
    return FAMILIES[read_index(_parts(source))["_class_name"]]


def _parts(source: Path | SingleFile) -> Path:
    return source.parts if isinstance(source, SingleFile) else source


def read_index(folder: Path) -> dict:
    """model_index.json of a teacher whose family is known."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"teacher {folder}: model_index.json is not JSON ({error}); fetch the teacher again") from error
    except OSError as error:
        raise InputMissing(f"cannot read {error.filename}: {error.strerror}; let this user read it") from error
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise DataError(f"teacher {folder} is a {name}; DMDR knows {', '.join(FAMILIES)}")
    return index


def digest_teacher(source: Path | SingleFile) -> str:
    """sha256 over the (relative path, sha256) of every file: the teacher's identity, wherever the folder lies.

    Of one file with its parts: over the sha256 of the file and the digest of the parts.
    """
    if isinstance(source, SingleFile):
        return hashlib.sha256(f"{digests.digest(source.file)} {digests.digest(source.parts)}\n".encode()).hexdigest()
    return digests.digest(source)


def load_teacher(source: Path | SingleFile, device: str = "cpu", *, text: bool = True, resolution: int | None = None):
    """The Backbone of a teacher, frozen, in float32; `text=False` leaves the text encoders on disk.

    resolution: of its images in pixels a side; None: the family's own.

    Raises:
        DataError: a family that DMDR does not know, a damaged file, a tensor that is missing or of another shape, or a
            resolution that the family does not have.
    """
    return build_backbone(family_of(source), load_pipeline(source, text=text).to(device), resolution)


def backbone_classes() -> dict[str, type]:
    """family -> its Backbone."""
    from dmdr.backbones.flux import Flux
    from dmdr.backbones.sd3 import SD3
    from dmdr.backbones.sdxl import SDXL
    from dmdr.backbones.z_image import ZImage

    return {each.family: each for each in (SD3, SDXL, ZImage, Flux)}


def build_backbone(family: str, pipe, resolution: int | None):
    """The Backbone of a family around its pipeline.

    Raises:
        DataError: a resolution that the family does not have.
    """
    return backbone_classes()[family](pipe, resolution)


def load_pipeline(source: Path | SingleFile, *, text: bool = True):
    """The teacher's own pipeline, in float32; raises as `load` does."""
    import diffusers
    import torch
    from diffusers.utils import logging
    from safetensors import SafetensorError, safe_open
    from transformers.utils import logging as transformers_logging

    from dmdr.teacher import single_file

    folder = _parts(source)
    index = read_index(folder)
    for file in (file for file in digests.list_files(folder) if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            found = f"{file.stat().st_size:,} bytes"
            raise DataError(f"teacher file {file} is damaged ({error}; {found}); fetch the teacher again") from error
    kind = getattr(diffusers, index["_class_name"])
    texts = {part for part in index if part.startswith(("text_encoder", "tokenizer"))}
    absent = {part for part in texts if index[part] == [None, None]}  # diffusers wants to be told
    given = dict.fromkeys(absent if text else texts)
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        if isinstance(source, SingleFile):
            pipe = single_file.load_single_file(kind, family_of(source), source, given)
        else:
            encoders = {part for part in texts - given.keys() if part.startswith("text_encoder")}
            given |= {part: _load_text_encoder(folder, part, index[part]) for part in encoders}
            pipe = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **given)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split()).split(" If you want to instead")[0]
        raise DataError(f"teacher {folder} does not load: {said}") from error
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            _require_all(folder, part, {name for name, value in module.state_dict().items() if value.is_meta})
        if isinstance(module, diffusers.ModelMixin):
            module.register_to_config(_name_or_path="")  # a path of this machine, which would be exported
    return pipe


def _load_text_encoder(folder: Path, part: str, kind: tuple[str, str]):
    """A text encoder, with the care that diffusers does not take: where a tensor is missing it goes on with noise."""
    import torch
    import transformers

    encoder, found = getattr(transformers, kind[1]).from_pretrained(
        folder / part,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _require_all(folder, part, found["missing_keys"])
    for name, there, wanted in found["mismatched_keys"]:
        raise DataError(
            f"teacher {folder}: {part} has {name} of shape {tuple(there)}, its config.json asks for {tuple(wanted)}; "
            "fetch the teacher again"
        )
    return encoder


def _require_all(folder: Path, part: str, missing: set[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"teacher {folder}: {part} lacks the tensor {min(missing)}{more}; fetch the teacher again")
