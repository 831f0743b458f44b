"""The exported folder against plain diffusers: the student's images, with none of our code on the other side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dmdr import teacher
from dmdr.config_file import load
from dmdr.errors import DataError
from dmdr.export import LORA_FILE, WEIGHTS, load_student, parity, save_lora, save_pipeline
from dmdr.rollout import student_sample
from stages import Stopped, export
from tests.trained_run import context_for, full_student, lora_student, run_stage, trained_run

PROMPTS = ["a red circle", "a cat that wears a hat"]
PART = {"tiny-sd3": "transformer", "tiny-sdxl": "unet"}
ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dmdr", "stages", "flows"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, steps, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
torch.manual_seed(7)
images = pipe({prompts}, num_inference_steps=int(steps), guidance_scale=1.0, output_type="pt").images
assert not {{"dmdr", "stages", "flows"}} & set(sys.modules)
save_file({{"images": images.contiguous()}}, out)
"""


def exported(student: Path, tiny_folder: Path, folder: Path, steps: int):
    backbone = teacher.load(tiny_folder)
    load_student(backbone.network, student)
    save_pipeline(backbone, backbone.network, steps, folder)
    return backbone


@pytest.mark.parametrize("make", [full_student, lora_student])
def test_folder_draws_the_students_images(make, tiny_folder, tmp_path):
    backbone = exported(make(tmp_path / "joint", tiny_folder), tiny_folder, tmp_path / "pipeline", steps=2)
    assert parity(backbone, backbone.network, 2, tmp_path / "pipeline", seed=0) <= 1e-4
    untouched = teacher.load(tiny_folder)
    with pytest.raises(DataError, match="does not draw the student's images"):  # and the check can tell
        parity(untouched, untouched.network, 2, tmp_path / "pipeline", seed=0)


def test_folder_needs_no_code_of_ours(tiny_folder, tmp_path):
    steps, folder = 4, tmp_path / "pipeline"
    backbone = exported(full_student(tmp_path / "joint", tiny_folder), tiny_folder, folder, steps)
    code = ELSEWHERE.format(prompts=PROMPTS)
    out = tmp_path / "images.safetensors"
    command = [sys.executable, "-I", "-c", code, str(folder), str(steps), str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    torch.manual_seed(7)
    shape = (len(PROMPTS), *backbone.latent_shape)
    noises = torch.stack([torch.randn(shape) for _ in range(steps)])
    c = backbone.collate(backbone.encode(PROMPTS)[0])
    ours = backbone.decode(student_sample(backbone, backbone.network, c, backbone.student_times(steps), noises))
    assert (ours - load_file(out)["images"]).abs().max() < 1e-3


def test_teacher_without_t5_exports_a_folder_that_loads(tiny_sd3_folder, tmp_path):
    bare = DiffusionPipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    bare.save_pretrained(tmp_path / "bare")
    backbone = exported(
        full_student(tmp_path / "joint", tmp_path / "bare"), tmp_path / "bare", tmp_path / "pipeline", 2
    )
    assert parity(backbone, backbone.network, 2, tmp_path / "pipeline", seed=0) <= 1e-4


def test_weights_stay_float32_and_exact(tiny_folder, tmp_path):
    student = full_student(tmp_path / "joint", tiny_folder)
    exported(student, tiny_folder, tmp_path / "pipeline", steps=2)
    there = teacher.load(tmp_path / "pipeline", text=False).network.state_dict()
    assert all(torch.equal(weight, there[name]) for name, weight in load_file(student / WEIGHTS).items())
    assert {weight.dtype for weight in there.values()} == {torch.float32}


def test_lora_alone_on_the_teacher_draws_the_same(tiny_folder, tmp_path):
    student = lora_student(tmp_path / "joint", tiny_folder)
    exported(student, tiny_folder, tmp_path / "pipeline", steps=2)
    save_lora(teacher.load(tiny_folder), student / WEIGHTS, tmp_path / "lora")
    assert (tmp_path / "lora" / LORA_FILE).is_file()

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(3)
        return pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, output_type="latent").images

    fused = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    plain = DiffusionPipeline.from_pretrained(tiny_folder, scheduler=fused.scheduler)
    without = images(plain)
    plain.load_lora_weights(tmp_path / "lora")
    assert (images(plain) - images(fused)).abs().max() < 1e-4
    assert (without - images(fused)).abs().max() > 1e-2


def test_no_adapter_remains_in_a_fused_folder(tiny_folder, tmp_path):
    exported(lora_student(tmp_path / "joint", tiny_folder), tiny_folder, tmp_path / "pipeline", steps=2)
    (file,) = (tmp_path / "pipeline").joinpath(PART[tiny_folder.name]).glob("*.safetensors")
    assert not [name for name in load_file(file) if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize("make", [full_student, lora_student])
def test_foreign_or_damaged_weights_are_refused(make, tiny_folder, tmp_path):
    student = make(tmp_path / "joint", tiny_folder)
    weights, network = load_file(student / WEIGHTS), teacher.load(tiny_folder).network
    save_file({f"other.{name}": weight for name, weight in weights.items()}, student / WEIGHTS)
    with pytest.raises(DataError, match="not a student of this teacher"):
        load_student(network, student)
    (student / WEIGHTS).write_bytes((student / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(DataError, match="not a student of this teacher"):
        load_student(network, student)


@pytest.mark.parametrize("student", [{"steps": 2}, {"steps": 1, "form": "lora", "lora_rank": 4}])
def test_stage_exports_with_provenance(student, tiny_config, tiny_folder, tmp_path):
    config = load(tiny_config(student=student, teacher={"path": str(tiny_folder), "guidance_scale": 3.0, "steps": 3}))
    store = trained_run(config, tmp_path / "store")
    folder = run_stage(config, store, "export")
    assert (folder / "lora" / LORA_FILE).is_file() == (config.student.form == "lora")

    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["parity"] <= 1e-4
    assert facts["teacher"] == {"name": tiny_folder.name, "digest": teacher.digest(tiny_folder)}
    assert (facts["nfe"], facts["rewards"]) == (config.student.steps, {"lab-conv": 1.0})
    assert facts["prompts"]["counts"]["train"] == 14
    assert set(facts["stages"]) == {"prompts", "cold_start", "joint"}
    assert facts["settings"]["student.steps"] == facts["settings"]["seed"] - 3 + config.student.steps

    card = (folder / "pipeline" / "README.md").read_text()
    said = [facts["teacher"]["digest"], facts["prompts"]["fingerprint"], "lab-conv", "licence follows the teacher's"]
    assert all(each in card for each in said + [stage["fingerprint"] for stage in facts["stages"].values()])
    assert str(tmp_path) not in card + json.dumps(facts)  # addresses of this machine mean nothing elsewhere
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    lines = snippet.replace('"pipeline"', repr(str(folder / "pipeline"))).replace("image.png", str(tmp_path / "i.png"))
    exec(lines)  # what the card tells a user to type
    assert (tmp_path / "i.png").is_file()


def test_stage_stops_when_asked(tiny_config, tmp_path):
    config = load(tiny_config())
    with pytest.raises(Stopped):
        export.run(context_for(config, trained_run(config, tmp_path / "store"), "export", stop=lambda: True))
