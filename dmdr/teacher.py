"""Finding, fingerprinting and loading a teacher: a diffusers pipeline folder, or the one that ships with the lab."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from dmdr.errors import DataError, InputMissing

LAB = Path(__file__).parent / "lab" / "teachers"


def resolve(path: str) -> Path:
    """The folder behind a config's teacher.path; "lab:NAME" is a teacher of the lab.

    Raises:
        InputMissing: no such folder.
        DataError: the folder is not a diffusers pipeline.
    """
    folder = LAB / path.removeprefix("lab:") if path.startswith("lab:") else Path(path)
    if not folder.is_dir():
        have = ", ".join(sorted(f"lab:{each.name}" for each in LAB.iterdir())) if LAB.is_dir() else "none"
        raise InputMissing(f"teacher.path {path}: no such folder; give a diffusers folder or one of the lab's: {have}")
    if not (folder / "model_index.json").is_file():
        raise DataError(f"teacher.path {path} has no model_index.json; save the pipeline there with save_pretrained")
    return folder


@functools.cache  # a run asks for it at each stage
def digest(folder: Path) -> str:
    """sha256 over the (relative path, sha256) of every file: the teacher's identity, wherever the folder lies."""
    total = hashlib.sha256()
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def load(folder: Path, device: str = "cpu", *, text: bool = True, resolution: int | None = None):
    """The Backbone of a teacher folder, frozen, in float32; `text=False` leaves the text encoders on disk.

    resolution: of its images in pixels a side; None: the family's own.

    Raises:
        DataError: a family that DMDR does not know, a damaged tensor file, or a resolution that it does not have.
    """
    import torch
    from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline, ZImagePipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError, safe_open
    from transformers.utils import logging as transformers_logging

    from dmdr.backbones.flux import Flux
    from dmdr.backbones.sd3 import SD3
    from dmdr.backbones.sdxl import SDXL
    from dmdr.backbones.z_image import ZImage

    families = {
        "StableDiffusion3Pipeline": (StableDiffusion3Pipeline, SD3),
        "StableDiffusionXLPipeline": (StableDiffusionXLPipeline, SDXL),
        "ZImagePipeline": (ZImagePipeline, ZImage),
        "FluxPipeline": (FluxPipeline, Flux),
    }
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"teacher {folder}: model_index.json is not JSON ({error}); fetch the teacher again") from error
    name = index.get("_class_name")
    if name not in families:
        raise DataError(f"teacher {folder} is a {name}; DMDR knows {', '.join(families)}")
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            found = f"{file.stat().st_size:,} bytes"
            raise DataError(f"teacher file {file} is damaged ({error}; {found}); fetch the teacher again") from error
    pipeline, backbone = families[name]
    texts = {part for part in index if part.startswith(("text_encoder", "tokenizer"))}
    absent = {part for part in texts if index[part] == [None, None]}  # diffusers wants to be told
    without = dict.fromkeys(absent if text else texts)
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **without)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"teacher {folder} does not load: {' '.join(str(error).split())}") from error
    return backbone(pipe.to(device), resolution)
