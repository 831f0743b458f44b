"""The precision of exported files: rounded once, compared strictly, and no reason to do an old run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dmdr.config.few_steps import FewSteps
from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.stages import STAGES
from dmdr.errors import DataError
from dmdr.export.parity import compare_latents, load_form, measure_difference, sample_probes
from dmdr.export.rounding import DTYPES, cast_weights, hold_in, list_modules, round_parts
from dmdr.export.write import WEIGHTS, build_metadata, load_student, write_form
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import lora_student, run_stage


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image", "flux"])
def test_every_form_holds_the_rounded_student(family, dtype, request, tmp_path):
    """And draws it as exactly as a float32 form does."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    student, backbone = lora_student(tmp_path / "joint", folder), copy_teacher(folder, 16)
    load_student(backbone.network, student, lora_dtype=DTYPES[dtype])
    unrounded = sample_probes(backbone, FewSteps(2), seed=0)
    about = build_metadata(backbone, FewSteps(2), title="tiny", teacher="ab")
    forms = ["lora", "weights", "pipeline", *(["single-file"] if family in ("sd3", "sdxl") else [])]
    for form in forms:
        round_parts(backbone, form, DTYPES[dtype])
        write_form(form, backbone, student / WEIGHTS, FewSteps(2), tmp_path, about, dtype=DTYPES[dtype])
        pipe = load_form(form, tmp_path, backbone, folder, FewSteps(2))
        assert compare_latents(backbone, backbone.network, FewSteps(2), pipe, seed=0) < 1e-4
        for file in (tmp_path / form).rglob("*.safetensors"):
            held = {
                name: w.dtype for name, w in load_file(file).items() if not name.endswith((".alpha", "position_ids"))
            }
            assert set(held.values()) == {DTYPES[dtype]}, file
    assert 0 < measure_difference(unrounded, sample_probes(backbone, FewSteps(2), seed=0)) < 0.1
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")  # one dtype even where the call names none
    assert {module.dtype for module in list_modules(pipe)} == {torch.float32}


def test_the_dtype_of_files_comes_and_goes_without_a_trace(tiny_z_image_folder):
    pipe = copy_teacher(tiny_z_image_folder, 16).pipe
    state = {name: w for n, each in enumerate(list_modules(pipe)) for name, w in _everything(each, n).items()}
    round_to = {name: w.to(torch.bfloat16).float() if "weight" in name else w for name, w in state.items()}
    with hold_in(pipe, torch.bfloat16):
        assert {each.dtype for each in list_modules(pipe)} == {torch.bfloat16}
    after = {name: w for n, each in enumerate(list_modules(pipe)) for name, w in _everything(each, n).items()}
    tables = [name for name in after if "inv_freq" in name]
    assert tables
    assert all(torch.equal(after[name], state[name]) for name in tables)
    assert all(torch.equal(after[name], round_to[name]) for name in after if name.endswith("weight"))


def _everything(module: torch.nn.Module, number: int) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, also those that no file holds."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {f"{number}.{name}": tensor.clone() for name, tensor in named}


def test_a_weight_that_a_dtype_cannot_hold_is_refused():
    weights = {"a.weight": torch.tensor([1.0, 70000.0]), "b.ids": torch.tensor([70000])}
    assert cast_weights(weights, torch.bfloat16)["b.ids"].dtype == torch.int64
    with pytest.raises(DataError, match="^a.weight holds 7e.04, which export.dtype float16 cannot hold; set bf"):
        cast_weights(weights, torch.float16)


def test_the_dtype_names_the_export_alone_and_old_exports_stay(tiny_config):
    """An export that was sealed before there was a dtype has the identity that the default has."""
    default = load_config(tiny_config())
    assert not [key for key in identity(default, "export") if "dtype" in key]
    half = load_config(tiny_config(export={"dtype": "float16"}))
    changed = [stage for stage in STAGES if identity(default, stage) != identity(half, stage)]
    assert changed == ["export"]
    assert identity(half, "export")["export.dtype"] == "float16"


def test_a_teacher_that_float16_cannot_hold_is_refused_before_training(tiny_config, tiny_sd3_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_sd3_folder, tmp_path / "large"))
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.bias"][0] = 1e5
    save_file(weights, file, {"format": "pt"})
    teacher = {"path": str(folder), "guidance_scale": 3.0, "steps": 3}
    run_stage(load_config(tiny_config(teacher=teacher)), tmp_path / "store", "prompts")
    with pytest.raises(DataError, match="proj_out.bias holds 1e.05, which export.dtype float16 cannot hold"):
        half = load_config(tiny_config(run="half", teacher=teacher, export={"dtype": "float16"}))
        run_stage(half, tmp_path / "store", "prompts")
