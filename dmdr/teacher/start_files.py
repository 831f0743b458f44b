"""Find what a student starts from, and fingerprint it. Only names and small files are read. No torch.

1. A start is a diffusers folder, of which only the network counts, the folder of a network or of a LoRA, a folder with
   the forms of an export, or one .safetensors file. Whether it holds a LoRA, its tensors say (`start_headers.py`).
2. Its identity is the content of its weights, and of the file that gives a LoRA its alpha. Where it lies, what else
   lies there, and how its scheduler is set, change no result.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmdr.config.start import Start
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.teacher import digests, hub
from dmdr.teacher.weight_files import PICKLES, VARIANTS, variant_of

KEY = "student.start.path"
WEIGHTS = ".safetensors"
NETWORK_FOLDERS = ("transformer", "unet")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT
PROVENANCE = "provenance.json"  # beside the forms of an export
ADAPTER = "adapter_config.json"  # of PEFT: it holds alpha
FORMS = {  # the form of the student -> the forms of an export in the order in which they are taken
    "lora": ("lora", "weights", "pipeline", "single-file"),
    "full": ("weights", "pipeline", "single-file", "lora"),
}
ABOUT = ("*.json", "README.md", "scheduler/*.json", "transformer/*.json", "unet/*.json")  # small files of a hub's model
HALF = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*")  # variants of the weights, read where the plain ones are not


@dataclass(frozen=True)
class StartSource:
    """Where a start lies.

    address: as the config gives it. files: its weights. config: config.json of the network. adapter: PEFT's of a LoRA.
    scheduler: scheduler_config.json. provenance: provenance.json of an export. card: README.md. None: there is none.
    """

    address: str
    files: tuple[Path, ...]
    config: Path | None = None
    adapter: Path | None = None
    scheduler: Path | None = None
    provenance: Path | None = None
    card: Path | None = None


def find_start(start: Start, form: Literal["full", "lora"]) -> StartSource:
    """Find what a student of this form starts from; a hub's files are fetched into its library's cache.

    Raises:
        ConfigError: a hub's model is not pinned to a commit, or has several files to choose from.
        InputMissing: there is no such file or folder, this user may not read it, or the hub does not give it.
        DataError: it holds no weights, or only such as are not read.
    """
    path = start.path
    place = _fetch(path) if hub.is_hub(path) else Path(path).expanduser()
    if place.suffix in PICKLES:
        raise DataError(
            f"{KEY} {path} is a pickle, which can run code; DMDR reads only safetensors: convert it where you trust it"
        )
    if os.path.isfile(place):
        if place.suffix != WEIGHTS:
            raise DataError(f"{KEY} {path} is no .safetensors file; give one, or a folder that holds one")
        _require_readable(path, place)
        return StartSource(path, (place,), **_find_about(place.parent))
    if not os.path.isdir(place):
        hint = f"; {found}" if (found := hub.suggest_address(path)) else ""
        if "://" in path:
            hint = "; dmdr pull RUN export FOLDER copies the export of a run from a store"
        raise InputMissing(
            f"{KEY} {path}: no such file or folder; give a .safetensors file, a diffusers folder or "
            f"hub:OWNER/NAME@COMMIT{hint}"
        )
    _require_readable(path, place)
    return _look_into(path, place, form)


def digest_start(source: StartSource) -> str:
    """The start's identity, wherever it lies: sha256 over the sha256 of each of its weight files, and of its adapter's
    configuration."""
    parts = [f"weights {digests.digest(file)}\n" for file in source.files]
    if source.adapter is not None:
        parts.append(f"adapter {digests.digest(source.adapter)}\n")
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _look_into(address: str, folder: Path, form: Literal["full", "lora"]) -> StartSource:
    """What a folder holds: a pipeline, a network, a LoRA, the forms of an export, a run with one, or one file."""
    if (folder / "export" / PROVENANCE).is_file():
        folder = folder / "export"
    if (folder / "model_index.json").is_file():
        parts = [name for name in NETWORK_FOLDERS if (folder / name).is_dir()]
        if not parts:
            raise DataError(
                f"{KEY} {address} is a pipeline without a folder {' or '.join(NETWORK_FOLDERS)}; give one that has its "
                "network there"
            )
        part = folder / parts[0]
        return StartSource(
            address, _select_weights(address, part), config=_if_file(part / "config.json"), **_find_about(folder)
        )
    if (forms := [name for name in FORMS[form] if (folder / name).is_dir()]) and (folder / PROVENANCE).is_file():
        return _look_into(address, folder / forms[0], form)
    for name in LORA_FILES:
        if (folder / name).is_file():
            adapter = _if_file(folder / ADAPTER) if name == LORA_FILES[1] else None
            return StartSource(address, (folder / name,), adapter=adapter, **_find_about(folder))
    if (folder / "config.json").is_file():
        return StartSource(
            address, _select_weights(address, folder), config=folder / "config.json", **_find_about(folder)
        )
    files = _list_weights(folder)
    if len(files) == 1:
        return StartSource(address, (files[0],), **_find_about(folder))
    if files:
        raise ConfigError(
            f"{KEY} {address} holds {len(files)} .safetensors files and no config.json; name the file itself, such as "
            f"{files[0].name}"
        )
    _select_weights(address, folder)
    raise AssertionError("a folder without weights was refused")


def _select_weights(address: str, folder: Path) -> tuple[Path, ...]:
    """The files of a network's weights: the plain ones, or where there are none those of the first variant."""
    files = _list_weights(folder)
    for variant in (None, *VARIANTS):
        if chosen := tuple(file for file in files if variant_of(file.name) == variant):
            return chosen
    pickles = sorted(each.name for each in folder.iterdir() if each.suffix in PICKLES)
    if pickles:
        raise DataError(
            f"{KEY} {address}: its weights are a pickle ({pickles[0]}), which can run code; DMDR reads only "
            "safetensors: save it with safe_serialization=True where you trust it"
        )
    raise DataError(f"{KEY} {address} has no weights (*.safetensors) in {folder.name}; fetch it again")


def _list_weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob(f"*{WEIGHTS}") if not file.name.startswith("."))


def _find_about(folder: Path) -> dict[str, Path | None]:
    """What lies beside the weights and tells of them. An export's provenance.json lies beside the folders of forms."""
    return {
        "scheduler": _if_file(folder / "scheduler" / "scheduler_config.json"),
        "provenance": _if_file(folder / PROVENANCE) or _if_file(folder.parent / PROVENANCE),
        "card": _if_file(folder / "README.md"),
    }


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _require_readable(address: str, place: Path) -> None:
    if not os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0)):
        raise InputMissing(f"{KEY} {address}: this user may not read {place}; change its permissions, or give another")


def _fetch(address: str) -> Path:
    """The folder of a hub's model with its network or its LoRA, or the one file that the address names."""
    if hub.pin(KEY, address)["file"] is not None:
        return hub.fetch(KEY, address, files=())
    folder = hub.fetch(KEY, address, files=ABOUT)
    if (folder / "model_index.json").is_file():
        wanted = tuple(f"{name}/*{WEIGHTS}" for name in NETWORK_FOLDERS)
    elif (folder / "config.json").is_file():
        wanted = ("diffusion_pytorch_model*.safetensors",)
    else:
        folder = hub.fetch(KEY, address, files=(*ABOUT, *LORA_FILES))
        if not any((folder / name).is_file() for name in LORA_FILES):
            raise ConfigError(
                f"{KEY} {address} is no diffusers folder and has no {' or '.join(LORA_FILES)}; name the file: "
                f"{address}/FILE.safetensors"
            )
        return folder
    folder = hub.fetch(KEY, address, files=(*ABOUT, *wanted), exclude=HALF)
    if not any(file for pattern in wanted for file in folder.glob(pattern)):
        folder = hub.fetch(KEY, address, files=(*ABOUT, *wanted))
    return folder
