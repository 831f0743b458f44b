"""A teacher folder with something wrong in it: one clear line, and never a network that is part noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr import teacher
from dmdr.errors import DataError, InputMissing

NETWORK = {"sd3": "transformer", "sdxl": "unet", "z_image": "transformer", "flux": "transformer"}


@pytest.fixture(params=NETWORK)
def folder(request, tmp_path) -> Path:
    """A copy of a tiny teacher, to be spoilt."""
    return Path(shutil.copytree(request.getfixturevalue(f"tiny_{request.param}_folder"), tmp_path / request.param))


def weights(folder: Path, part: str) -> Path:
    name = NETWORK[folder.name] if part == "network" else part
    (file,) = (folder / name).glob("*.safetensors")
    return file


def name_in(tensors: dict[str, torch.Tensor]) -> str:
    """A tensor in the middle of the file, on which no other depends."""
    return sorted(name for name in tensors if name.endswith(".weight"))[len(tensors) // 4]


@pytest.mark.parametrize("part", ["network", "vae", "text_encoder"])
def test_a_missing_tensor_is_named(folder, part):
    file = weights(folder, part)
    tensors = load_file(file)
    gone = name_in(tensors)
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=f"{file.parent.name} lacks the tensor {gone}; fetch the teacher again") as said:
        teacher.load(folder, resolution=16)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("part", ["network", "vae", "text_encoder"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, part):
    file = weights(folder, part)
    tensors = load_file(file)
    name = name_in(tensors)
    right = tuple(tensors[name].shape)
    tensors[name] = torch.zeros(*right, 2)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError) as said:
        teacher.load(folder, resolution=16)
    line = str(said.value).replace("[", "(").replace("]", ")")
    wanted = [name, f"({', '.join(map(str, right))}", f"({', '.join(map(str, (*right, 2)))})"]
    assert all(each in line for each in wanted), line
    assert "\n" not in line


def test_a_truncated_file_is_named(folder):
    file = weights(folder, "network")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{file} is damaged .*; fetch the teacher again"):
        teacher.load(folder)


def test_a_family_that_nobody_wrote_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    known = "StableDiffusion3Pipeline, StableDiffusionXLPipeline, ZImagePipeline, FluxPipeline"
    with pytest.raises(DataError, match=f"is a KandinskyPipeline; DMDR knows {known}"):
        teacher.load(folder)


def test_what_is_no_teacher_is_named(tmp_path):
    with pytest.raises(InputMissing, match="nowhere: no such folder"):
        teacher.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no model_index.json; save the pipeline there"):
        teacher.resolve(str(tmp_path))
