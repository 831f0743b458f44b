"""Find, fingerprint and load a teacher: a diffusers folder, a hub's revision, a teacher of the lab, a single file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from dmdr.config.inputs import Teacher
from dmdr.errors import DataError, InputMissing, doing
from dmdr.teacher import digests, hub, scheduler_config
from dmdr.teacher.index import FAMILIES, NETWORKS, Part, PipelineIndex, read_index
from dmdr.teacher.pipeline_files import INDEX, READ, list_pipeline_files
from dmdr.teacher.single_file import SingleFile, load_single_file
from dmdr.teacher.skeletons import build_skeleton
from dmdr.teacher.weight_files import MODELS, check_config, find_variant, refuse_foreign_tensors

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin
    from transformers import PreTrainedModel

    from dmdr.backbones.protocol import Backbone
    from dmdr.teacher.single_file import Model

TeacherSource = Path | SingleFile  # a diffusers folder, or one file with the folder of its configuration
ONE_FILE = ("sd3", "sdxl")  # the families of dmdr/teacher/original_layout.py
LAB = Path(__file__).parents[1] / "lab" / "teachers"
PIPELINE_FILES = (INDEX, *(f"*/*{end}" for end in READ))
HALF = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*")  # variants of the weights, read where the plain ones are not
OTHER_FORMS = ("*/*.non_ema.*", "*/flax_*", "*/openvino_*")  # of the same weights, in many repositories


def find_teacher(path: str, parts: str | None = None) -> TeacherSource:
    """Find the teacher of a config's teacher.path and teacher.parts.

    Args:
        path: a folder, "lab:NAME" for a teacher of the lab, "hub:OWNER/NAME@COMMIT", or with `parts` a .safetensors
            file. A hub's files are fetched once into its library's cache (HF_HOME); a commit pins the teacher for ever.
        parts: the folder with the configuration of such a file.

    Raises:
        ConfigError: a hub's teacher is not pinned to a commit.
        InputMissing: no such folder or file, one that cannot be read, or the hub does not give it.
        DataError: the folder is not a diffusers pipeline, or its family has no files of this kind.
    """
    if parts is None:
        return find_diffusers_folder("teacher.path", path)
    if not os.path.isfile(path):
        raise InputMissing(f"teacher.path {path}: no such file; give a .safetensors file, or a folder without parts")
    source = SingleFile(Path(path), find_diffusers_folder("teacher.parts", parts))
    if family_of(source) not in ONE_FILE:
        raise DataError(
            f"teacher.parts {parts} is of the family {family_of(source)}, but only a teacher of the families "
            f"{', '.join(ONE_FILE)} can be one file; give a diffusers folder as teacher.path"
        )
    return source


def find_teacher_of(config: Teacher) -> TeacherSource:
    """`find_teacher` for a config's section."""
    return find_teacher(config.path, config.parts)


def find_diffusers_folder(key: str, path: str) -> Path:
    """The folder of a pipeline: a path, "lab:NAME" or "hub:OWNER/NAME@COMMIT". `key`: of the config, for messages.

    Raises:
        ConfigError, InputMissing, DataError: as `find_teacher`.
    """
    if hub.is_hub(path):
        folder = hub.fetch(key, path, files=PIPELINE_FILES, exclude=(*OTHER_FORMS, *HALF))
        if any((folder / part).is_dir() and not any((folder / part).glob("*.safetensors")) for part in MODELS):
            folder = hub.fetch(key, path, files=PIPELINE_FILES, exclude=OTHER_FORMS)
    elif path.startswith("lab:"):
        folder = LAB / path.removeprefix("lab:")
    else:
        folder = Path(path)
    if not os.path.isdir(folder):
        names = ", ".join(sorted(f"lab:{each.name}" for each in LAB.iterdir())) if LAB.is_dir() else "none"
        hint = f"; {found}" if (found := hub.suggest_address(path)) else ""
        raise InputMissing(
            f"{key} {path}: no such folder; give a diffusers folder or a teacher of the lab: {names}{hint}"
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputMissing(f"{key} {path}: this user may not read {folder}; change its permissions, or give another")
    if not (folder / "model_index.json").is_file():
        raise DataError(f"{key} {path} has no model_index.json; save the pipeline there with save_pretrained")
    return folder


def family_of(source: TeacherSource) -> str:
    """The family of a teacher, by its index.

    Raises:
        DataError: DMDR does not know the family.
    """
    return read_index(_config_folder(source)).family


def note_sampler(source: TeacherSource) -> str | None:
    """What a user should know about the sampler of a teacher; None if there is nothing.

    Raises:
        DataError: as `load_teacher`.
    """
    folder = _config_folder(source)
    return scheduler_config.note_sampler(folder, read_index(folder))


def digest_teacher(source: TeacherSource) -> str:
    """The teacher's identity, wherever it lies: sha256 over the (relative path, sha256) of its pipeline's files.

    Of one file with its parts: over the sha256 of the file and the digest of the parts.
    """
    return _digest_source(source, digest_pipeline)


def digest_pipeline(folder: Path) -> str:
    """sha256 over the (relative path, sha256) of the files that make the pipeline in a diffusers folder."""
    return digests.digest_files(folder, list_pipeline_files(folder))


def digest_teacher_as_before(source: TeacherSource) -> str:
    """The identity that runs of DMDR 0.1 recorded, where every file that lay in the folder counted."""
    return _digest_source(source, digests.digest)


def is_teacher(source: TeacherSource, recorded: str) -> bool:
    """Whether a run that recorded this digest was made with the teacher."""
    return digest_teacher(source) == recorded or digest_teacher_as_before(source) == recorded


def _digest_source(source: TeacherSource, digest_folder: Callable[[Path], str]) -> str:
    if isinstance(source, SingleFile):
        return hashlib.sha256(f"{digests.digest(source.file)} {digest_folder(source.parts)}\n".encode()).hexdigest()
    return digest_folder(source)


def load_teacher(
    source: TeacherSource,
    device: str | torch.device = "cpu",
    *,
    text: bool = True,
    resolution: int | None = None,
    weights: bool = True,
) -> Backbone:
    """Load a teacher, frozen, in float32.

    Args:
        text: False leaves the text encoders on disk.
        resolution: of its images in pixels a side; None: the family's own.
        weights: False leaves those of the network on disk. It then lies on meta, and everything else on the CPU.

    Raises:
        DataError: DMDR does not know the family, a file is damaged, a tensor is missing or of another shape, or the
            family does not have that resolution.
    """
    with doing(f"loading the teacher {source}"):
        folder = _config_folder(source)
        scheduler_config.check_scheduler(folder, read_index(folder))
        pipe = load_pipeline(source, text=text, weights=weights)
        return build_backbone(pipe.to(device) if weights else pipe, resolution)


def load_network(folder: Path, device: str | torch.device = "cpu") -> ModelMixin:
    """Load the network of a pipeline, frozen, in float32: that of a student, whose scheduler no teacher has.

    Raises:
        DataError: as `load_teacher`.
    """
    return build_backbone(load_pipeline(folder, text=False).to(device), None).network


def backbone_classes() -> dict[str, type[Backbone]]:
    """The Backbone of each family."""
    from dmdr.backbones.flux import Flux
    from dmdr.backbones.sd3 import SD3
    from dmdr.backbones.sdxl import SDXL
    from dmdr.backbones.z_image import ZImage

    return {SD3.family: SD3, SDXL.family: SDXL, ZImage.family: ZImage, Flux.family: Flux}


def build_backbone(pipe: DiffusionPipeline, resolution: int | None) -> Backbone:
    """The Backbone of a pipeline's family around it.

    Raises:
        DataError: the family does not have that resolution.
    """
    return backbone_classes()[FAMILIES[type(pipe).__name__]](pipe, resolution)


def load_pipeline(source: TeacherSource, *, text: bool = True, weights: bool = True) -> DiffusionPipeline:
    """Load the teacher's own pipeline in float32. text, weights: and raises, as `load_teacher`."""
    import diffusers
    import torch
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    folder = _config_folder(source)
    index = read_index(folder)
    _check_headers(folder)
    network = NETWORKS[index.family][0]
    given = {} if weights else {network: build_skeleton(folder, network, index.require_part(network))}
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = _load_parts(source, index, given, text=text)
    except (DataError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a library that builds a network from a wrong value raises whatever comes first
        message = " ".join(str(error).split()).split(" If you want to instead")[0]
        raise DataError(f"teacher {folder} does not load: {type(error).__name__}: {message}") from error
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and name not in given:
            _require_all(folder, name, {key for key, value in module.state_dict().items() if value.is_meta})
        if isinstance(module, diffusers.ModelMixin):
            module.register_to_config(_name_or_path="")  # a path of this machine, which would be exported
    return pipe


def _config_folder(source: TeacherSource) -> Path:
    return source.parts if isinstance(source, SingleFile) else source


def _check_headers(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    for file in digests.list_files(folder):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt") as header:
                names = list(header.keys())
        except SafetensorError as error:
            size = f"{file.stat().st_size:,} bytes"
            raise DataError(f"teacher file {file} is damaged ({error}; {size}); fetch the teacher again") from error
        if file.parent != folder:  # one file for other programs may lie beside the folders
            refuse_foreign_tensors(names, file)


def _load_parts(
    source: TeacherSource, index: PipelineIndex, given: Mapping[str, Model], *, text: bool
) -> DiffusionPipeline:
    """The pipeline of an index. diffusers does not load a part that we pass: an encoder of ours, one of `given`, or
    None. It loads no pickle, and no class that is not its own."""
    import diffusers
    import torch

    left_out = {name for name in index.text_parts if not text or index.parts[name] is None}
    if isinstance(source, SingleFile):
        return load_single_file(source, index, left_out, given)
    kind: type[DiffusionPipeline] = getattr(diffusers, index.class_name)
    overrides: dict[str, Model | None] = {**dict.fromkeys(left_out), **given}
    for name, part in index.parts.items():
        if part is None or name not in MODELS or name in overrides:
            continue
        check_config(source, name)
        variant = find_variant(source, name)
        if name.startswith("text_encoder"):
            overrides[name] = _load_text_encoder(source, name, part, variant)
        elif variant is not None:
            model: type[ModelMixin] = getattr(diffusers, part.class_name)
            overrides[name] = model.from_pretrained(
                source / name, dtype=torch.float32, local_files_only=True, use_safetensors=True, variant=variant
            )
    return kind.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False, **overrides
    )


class _LoadingReport(TypedDict):
    """What transformers tells of a model that it has loaded, as far as we read it."""

    missing_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]  # name, shape in the file, shape that the config needs


def _load_text_encoder(folder: Path, name: str, part: Part, variant: str | None) -> PreTrainedModel:
    """Load a text encoder and check it, which diffusers does not: it fills a missing tensor with noise."""
    import torch
    import transformers

    encoder: PreTrainedModel
    report: _LoadingReport
    encoder, report = getattr(transformers, part.class_name).from_pretrained(
        folder / name,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        variant=variant,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _require_all(folder, name, report["missing_keys"])
    for key, shape, expected in report["mismatched_keys"]:
        raise DataError(
            f"teacher {folder}: {name} has {key} of shape {tuple(shape)}, but its config.json needs "
            f"{tuple(expected)}; fetch the teacher again"
        )
    return encoder


def _require_all(folder: Path, part: str, missing: set[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"teacher {folder}: {part} lacks the tensor {min(missing)}{more}; fetch the teacher again")
