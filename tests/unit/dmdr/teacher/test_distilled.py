"""Which teachers look like few-step models: one warning for them, none for the bases that people distil."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dmdr.teacher.distilled import warn_of_distilled, warn_of_name

BASES = (
    "hub:stabilityai/stable-diffusion-xl-base-1.0@{}",
    "hub:stabilityai/stable-diffusion-3-medium-diffusers@{}",
    "hub:stabilityai/stable-diffusion-3.5-large@{}",
    "hub:Tongyi-MAI/Z-Image@{}",
    "hub:black-forest-labs/FLUX.1-dev@{}",
    "/models/turbo/realism-hyperreal-xl",
    "my-25-step-model",
    "dmdr-teacher@3",
    "lab:flow",
)
DISTILLED = (
    "hub:stabilityai/sdxl-turbo@{}",
    "hub:Tongyi-MAI/Z-Image-Turbo@{}",
    "hub:black-forest-labs/FLUX.1-schnell@{}",
    "hub:ByteDance/SDXL-Lightning@{}/sdxl_lightning_4step_unet.safetensors",
    "hub:ByteDance/Hyper-SD@{}",
    "hub:tianweiy/DMD2@{}",
    "/models/lcm-sdxl",
    "my_model_4step",
    "few-step-student",
    "realvisXL_V40LightningBakedvae.safetensors",
)


@pytest.mark.parametrize("path", [path.format("0" * 40) for path in BASES])
def test_names_of_bases_raise_no_alarm(path: str) -> None:
    assert warn_of_name(path) is None


@pytest.mark.parametrize("path", [path.format("0" * 40) for path in DISTILLED])
def test_names_of_few_step_models_do(path: str) -> None:
    warning = warn_of_name(path)
    assert warning is not None and "DMD needs the multi-step base" in warning and "\n" not in warning


def test_the_tiny_bases_raise_no_alarm(
    tiny_sd3_folder: Path, tiny_sdxl_folder: Path, tiny_z_image_folder: Path
) -> None:
    for folder in (tiny_sd3_folder, tiny_sdxl_folder, tiny_z_image_folder):
        assert warn_of_distilled(str(folder), folder) is None


def test_guidance_as_an_input_is_told_apart(tiny_flux_folder: Path) -> None:
    warning = warn_of_distilled(str(tiny_flux_folder), tiny_flux_folder)
    assert warning is not None and "guidance_embeds" in warning and "can be a teacher" in warning
    assert "few-step" not in warning


def change(folder: Path, place: Path, file: str, **settings: object) -> Path:
    """A copy of a teacher's folder with other settings in one of its files."""
    shutil.copytree(folder, place)
    path = place / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return place


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("scheduler/scheduler_config.json", {"stochastic_sampling": True}),
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}),
        ("model_index.json", {"scheduler": ["diffusers", "LCMScheduler"]}),
        ("model_index.json", {"is_distilled": True}),
        ("model_index.json", {"guidance_scale": 1.0}),
        ("model_index.json", {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}),
        ("transformer/config.json", {"_name_or_path": "somebody/SD3-Lightning"}),
    ],
)
def test_settings_of_few_step_models_do(
    tmp_path: Path, tiny_sd3_folder: Path, file: str, settings: dict[str, object]
) -> None:
    folder = change(tiny_sd3_folder, tmp_path / "model", file, **settings)
    warning = warn_of_distilled(str(folder), folder)
    assert warning is not None and "looks like a few-step model" in warning


def test_what_the_weights_say_of_themselves_counts(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3_folder, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for metadata in ({"dmdr.guidance_scale": "0"}, {"dmdr.steps": "4"}, {"modelspec.title": "SD3 Turbo"}):
        save_file(load_file(file), file, {"format": "pt", **metadata})
        assert "looks like a few-step model" in (warn_of_distilled(str(folder), folder) or "")
