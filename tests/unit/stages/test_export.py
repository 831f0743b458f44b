"""The exported forms against plain diffusers: the student's images, with none of our code on the other side."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError, Stopped
from dmdr.export.parity import compare_latents, load_form
from dmdr.export.write import LORA_FILE, NETWORK_FILE, WEIGHTS, build_metadata, load_student, save_pipeline, write_form
from dmdr.rollout import sample_student
from dmdr.teacher.load import digest_teacher, load_network
from stages import export
from stages.reports.export_facts import ExportFacts
from stages.reports.model_card import render_card
from stages.store.artifacts import Artifact
from tests.support import tiny_configs
from tests.support.sealing import PROVENANCE
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import context_for, full_student, lora_student, run_stage, seal_stage, trained_run

PROMPTS = ["a red circle", "a cat that wears a hat"]
COMMIT = "0123456789" * 4
ALL = ["pipeline", "lora", "weights", "single-file"]
PART = {"tiny-sd3": "transformer", "tiny-sdxl": "unet"}
# a torchvision that was not built for this torch fails every import of diffusers; nothing here needs it
HIDDEN = "import sys\nsys.modules['torchvision'] = None\n"
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
steps, *folders = sys.argv[1:]
for folder in folders:
    pipe = DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(7)
    images = pipe({prompts}, num_inference_steps=int(steps), guidance_scale=1.0, output_type="pt").images
    save_file({{"images": images.contiguous()}}, f"{{folder}}.safetensors")
assert not {{"dmdr", "stages", "flows"}} & set(sys.modules)
"""


def exported(student: Path, tiny_folder: Path, folder: Path, few: FewSteps):
    backbone = copy_teacher(tiny_folder)
    load_student(backbone.network, student)
    save_pipeline(backbone, backbone.network, few, folder)
    return backbone


@pytest.mark.parametrize(
    ("make", "few"),
    [(full_student, FewSteps(2)), (lora_student, FewSteps(2, eta=0.0)), (lora_student, FewSteps(2, 0.3, (900, 400)))],
)
def test_every_form_draws_the_students_images(make, few, tiny_folder, tmp_path):
    student = make(tmp_path / "joint", tiny_folder)
    backbone = exported(student, tiny_folder, tmp_path / "pipeline", few)
    about = build_metadata(backbone, few, title="tiny", teacher="ab")
    others = ALL[2:] if make is full_student else ALL[1:]
    untouched = copy_teacher(tiny_folder)
    for form in others:
        write_form(form, backbone, student / WEIGHTS, few, tmp_path, about)
    for form in ("pipeline", *others):
        pipe = load_form(form, tmp_path, backbone, tiny_folder, few)
        assert compare_latents(backbone, backbone.network, few, pipe, seed=0) <= 1e-4
        with pytest.raises(DataError, match="does not draw the student's images"):  # and the check can tell
            compare_latents(untouched, untouched.network, few, pipe, seed=0)


@pytest.mark.process
def test_folder_needs_no_code_of_ours(tiny_sd3_folder, tiny_sdxl_folder, tmp_path):
    """A folder of each family, in one process."""
    steps, backbones = 4, {}
    for teacher in (tiny_sd3_folder, tiny_sdxl_folder):
        student, folder = full_student(tmp_path / "joint" / teacher.name, teacher), tmp_path / teacher.name
        backbones[folder] = exported(student, teacher, folder, FewSteps(steps))
    code = HIDDEN + ELSEWHERE.format(prompts=PROMPTS)
    command = [sys.executable, "-I", "-c", code, str(steps), *map(str, backbones)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    for folder, backbone in backbones.items():
        torch.manual_seed(7)
        shape = (len(PROMPTS), *backbone.latent_shape)
        noises = torch.stack([torch.randn(shape) for _ in range(steps)])
        c = backbone.collate(backbone.encode(PROMPTS)[0])
        ours = backbone.decode(
            sample_student(backbone, backbone.network, c, times=backbone.student_times(FewSteps(steps)), noises=noises)
        )
        assert (ours - load_file(f"{folder}.safetensors")["images"]).abs().max() < 1e-3


def test_teacher_without_t5_exports_a_folder_that_loads(tiny_sd3_folder, tmp_path):
    bare = DiffusionPipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    bare.save_pretrained(tmp_path / "bare")
    backbone = exported(
        full_student(tmp_path / "joint", tmp_path / "bare"), tmp_path / "bare", tmp_path / "pipeline", FewSteps(2)
    )
    about = build_metadata(backbone, FewSteps(2), title="tiny", teacher="ab")
    write_form("weights", backbone, tmp_path / "joint" / WEIGHTS, FewSteps(2), tmp_path, about)
    write_form("single-file", backbone, tmp_path / "joint" / WEIGHTS, FewSteps(2), tmp_path, about)
    for form in ("pipeline", "weights", "single-file"):
        pipe = load_form(form, tmp_path, backbone, tmp_path / "bare", FewSteps(2))
        assert compare_latents(backbone, backbone.network, FewSteps(2), pipe, seed=0) <= 1e-4


def test_weights_stay_float32_and_exact(tiny_folder, tmp_path):
    student = full_student(tmp_path / "joint", tiny_folder)
    exported(student, tiny_folder, tmp_path / "pipeline", FewSteps(2))
    there = load_network(tmp_path / "pipeline").state_dict()
    assert all(torch.equal(weight, there[name]) for name, weight in load_file(student / WEIGHTS).items())
    assert {weight.dtype for weight in there.values()} == {torch.float32}


class Exported(NamedTuple):
    """A LoRA student, fused into its teacher, and the exported pipeline."""

    student: Path
    backbone: Backbone
    pipe: DiffusionPipeline


@pytest.fixture(scope="module")
def fused(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("fused")
    student = lora_student(folder / "joint", tiny_folder)
    backbone = exported(student, tiny_folder, folder / "pipeline", FewSteps(4))
    return Exported(student, backbone, DiffusionPipeline.from_pretrained(folder / "pipeline"))


@pytest.mark.parametrize("form", ["weights", "single-file", "lora"])
def test_metadata_tells_how_to_sample(form, fused, tmp_path):
    """Read by safetensors alone; a call that follows it is the student's."""
    student, backbone, pipe = fused
    about = build_metadata(backbone, FewSteps(4), title="tiny", teacher="ab")
    write_form(form, backbone, student / WEIGHTS, FewSteps(4), tmp_path, about)
    (file,) = (tmp_path / form).glob("*.safetensors")
    with safe_open(file, framework="numpy") as opened:
        said = opened.metadata()
    assert said["dmdr.scheduler"] == type(pipe.scheduler).__name__
    scheduler = type(pipe.scheduler).from_config(json.loads(said["dmdr.scheduler_config"]))
    assert all(pipe.scheduler.config[key] == value for key, value in scheduler.config.items())
    steps, guidance = int(said["dmdr.steps"]), float(said["dmdr.guidance_scale"])
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="latent")
    assert json.loads(said["dmdr.timesteps"]) == pytest.approx(pipe.scheduler.timesteps.tolist(), abs=1e-3)
    assert said["dmdr.resolution"] == str(backbone.resolution)
    assert said["modelspec.sai_model_spec"] == "1.0.0"
    assert (said["modelspec.title"], said["dmdr.teacher"]) == ("tiny", "ab")
    assert said["modelspec.architecture"].startswith("stable-diffusion")
    assert (said["modelspec.implementation"] == "diffusers") == (form != "single-file")


def test_no_adapter_remains_in_a_fused_folder(tiny_folder, tmp_path):
    exported(lora_student(tmp_path / "joint", tiny_folder), tiny_folder, tmp_path / "pipeline", FewSteps(2))
    (file,) = (tmp_path / "pipeline").joinpath(PART[tiny_folder.name]).glob("*.safetensors")
    assert not [name for name in load_file(file) if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize("make", [full_student, lora_student])
def test_foreign_or_damaged_weights_are_refused(make, tiny_folder, tmp_path):
    student = make(tmp_path / "joint", tiny_folder)
    weights, network = load_file(student / WEIGHTS), copy_teacher(tiny_folder).network
    save_file({f"other.{name}": weight for name, weight in weights.items()}, student / WEIGHTS)
    with pytest.raises(DataError, match="not a student of this teacher"):
        load_student(network, student)
    (student / WEIGHTS).write_bytes((student / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(DataError, match="not a student of this teacher"):
        load_student(network, student)


def test_a_lora_of_another_base_is_refused(tiny_sd3_folder, tiny_sdxl_folder, tmp_path):
    for teacher_folder, other in ((tiny_sd3_folder, tiny_sdxl_folder), (tiny_sdxl_folder, tiny_sd3_folder)):
        student = lora_student(tmp_path / other.name, other)
        with pytest.raises(
            DataError, match="not a student of this teacher.*does not have; give the teacher that"
        ) as said:
            load_student(copy_teacher(teacher_folder).network, student)
        assert "\n" not in str(said.value)
    wide = {name: torch.cat([w, w], dim=int("lora_A" in name)) for name, w in load_file(student / WEIGHTS).items()}
    save_file(wide, student / WEIGHTS)
    with pytest.raises(DataError, match="not a student of this teacher.*size mismatch.*or train it again") as said:
        load_student(copy_teacher(tiny_sd3_folder).network, student)
    assert "\n" not in str(said.value)


def test_a_student_of_another_teacher_is_refused_before_anything_is_loaded(tiny_config, tiny_sd3_folder, tmp_path):
    """The same network, so that nothing but its digest can tell."""
    asked = {"guidance_scale": 3.0, "steps": 3}
    config = load_config(tiny_config(teacher={"path": str(tiny_sd3_folder), **asked}))
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    other = Path(shutil.copytree(tiny_sd3_folder, tmp_path / "other"))
    (file,) = (other / "transformer").glob("*.safetensors")
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    config = load_config(tiny_config(teacher={"path": str(other), **asked}))
    for stage, before in {"export": "joint", "evaluate": "prompts"}.items():
        with pytest.raises(ConfigError, match=f"{before} of run tiny was made with another teacher") as said:
            context_for(config, store, stage)
        assert "\n" not in str(said.value)


def test_an_export_of_another_student_is_refused(tiny_config, tiny_sd3_folder, tmp_path):
    """Joint training was done anew under the same name, or the export was copied from another run."""
    config = load_config(tiny_config())
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    shutil.rmtree(store / "tiny" / "joint")
    context = context_for(config, store, "joint")
    full_student(context.out, tiny_sd3_folder, 0.5)
    context.artifact.seal(context.out, facts={}, provenance=PROVENANCE)
    with pytest.raises(
        ConfigError, match="tiny/export was made from another joint than this run's: .*run export again"
    ):
        context_for(config, store, "evaluate")


AT_COMMIT = f'"some/model", revision="{COMMIT}", dtype=dtype, tokenizer_3=None)'


@pytest.mark.parametrize(
    ("teacher", "loads"),
    [
        ({"name": f"hub:some/model@{COMMIT}"}, f"from_pretrained({AT_COMMIT}"),
        (
            {"name": "one.safetensors", "parts": f"hub:some/model@{COMMIT}"},
            f'from_single_file("one.safetensors", config={AT_COMMIT}',
        ),
    ],
)
def test_the_card_loads_a_teacher_from_the_hub_at_its_commit(teacher, loads, tiny_config, tmp_path):
    config = load_config(tiny_config(student={"steps": 2, "form": "lora", "lora_rank": 4}))
    folder = seal_stage(config, trained_run(config, tmp_path / "store"), "export")
    facts = json.loads((folder / "provenance.json").read_text())
    facts["teacher"] |= teacher
    facts["classes"]["absent"] = ["tokenizer_3"]
    card = render_card(ExportFacts.model_validate(facts))
    assert f"pipe = StableDiffusion3Pipeline.{loads}.to(device)\npipe.scheduler = " in card
    assert "\nbase_model: some/model\n" in card


@pytest.mark.process
@pytest.mark.parametrize(
    ("family", "student", "forms"),
    [  # each family with each form, and with a student of each kind
        ("sd3", {"steps": 2}, None),
        ("sdxl", {"steps": 1, "form": "lora", "lora_rank": 4}, None),
        ("sd3", {"steps": 2, "form": "lora", "lora_rank": 4}, ALL),
        ("sdxl", {"steps": 4}, ["pipeline", "weights", "single-file"]),
    ],
)
def test_stage_exports_with_provenance(family, student, forms, tiny_config, request, tmp_path):
    tiny_folder = request.getfixturevalue(f"tiny_{family}_folder")
    asked = {"path": str(tiny_folder), "guidance_scale": 3.0, "steps": 3}
    config = load_config(tiny_config(student=student, teacher=asked, export={"forms": forms}))
    store = trained_run(config, tmp_path / "store")
    folder = run_stage(config, store, "export")
    wanted = forms or ["pipeline", *(["lora"] if config.student.form == "lora" else [])]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(wanted)
    assert (folder / "lora" / LORA_FILE).is_file() == ("lora" in wanted)
    assert (folder / "weights" / NETWORK_FILE).is_file() == ("weights" in wanted)

    facts = json.loads((folder / "provenance.json").read_text())
    assert list(facts["parity"]) == wanted
    assert max(facts["parity"].values()) <= 1e-4
    assert facts["teacher"] == {"name": tiny_folder.name, "digest": digest_teacher(tiny_folder), "parts": None}
    assert (facts["dtype"], 0 < facts["rounding"] < 0.1) == ("bfloat16", True)
    assert (facts["nfe"], facts["rewards"]) == (config.student.steps, {"lab-conv": 1.0})
    assert facts["prompts"]["counts"]["train"] == 14
    assert set(facts["stages"]) == {"prompts", "cold_start", "joint"}
    assert facts["settings"]["student.steps"] == facts["settings"]["seed"] - 3 + config.student.steps

    sums = (folder / export.SUMS).read_text().splitlines()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {line.split("  ")[1] for line in sums} == files - {export.SUMS, "record.json", "claim.json"}
    check = ["sha256sum", "--check", "--strict", "--quiet", export.SUMS]
    assert subprocess.run(check, cwd=folder).returncode == 0

    assert set(facts["samples"]) <= set(tiny_configs.PROMPTS[14:])
    assert facts["comfyui"] == [form for form in wanted if form != "pipeline"]
    for form in wanted:
        shown = sorted(path.name for path in (folder / form / "images").iterdir())
        assert shown == [f"{number}.png" for number in range(1, len(facts["samples"]) + 1)]
        assert (folder / form / "comfyui.json").is_file() == (form != "pipeline")
    (text,) = {(folder / form / "README.md").read_text() for form in wanted}
    said = [facts["teacher"]["digest"], facts["prompts"]["fingerprint"], "lab-conv", "licence follows the teacher's"]
    said += [f"| {form}, beside the training sampler | latents within" for form in wanted]
    assert all(each in text for each in said + [stage["fingerprint"] for stage in facts["stages"].values()])
    for file in folder.rglob("*.json"):  # addresses of this machine mean nothing elsewhere
        assert str(tmp_path.parent) not in file.read_text()
    assert str(tmp_path) not in text
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == len(wanted)
    for snippet in snippets:  # what the card tells a user to type
        lines = re.sub(r'"((pipeline|lora|weights|single-file)["/])', lambda path: f'"{folder}/{path[1]}', snippet)
        image = tmp_path / f"{snippets.index(snippet)}.png"
        exec(lines.replace(f'"{tiny_folder.name}"', repr(str(tiny_folder))).replace("image.png", str(image)), {})
        assert image.is_file()


def test_forms_that_a_teacher_cannot_have_are_refused_before_training(tiny_config, tiny_flux_folder, tmp_path):
    asked = {"guidance_scale": 3.0, "steps": 3, "resolution": 16}
    forms = {"forms": ["pipeline", "single-file"]}
    config = load_config(tiny_config(teacher={"path": str(tiny_flux_folder), **asked}, export=forms))
    with pytest.raises(ConfigError, match="single-file, but the teacher is of the family flux; .*: take it out"):
        context_for(config, tmp_path / "store", "prompts")


def test_a_teacher_that_the_layout_cannot_hold_is_refused_before_training(tiny_config, tiny_sd3_folder, tmp_path):
    spoilt = Path(shutil.copytree(tiny_sd3_folder, tmp_path / "spoilt"))
    (file,) = (spoilt / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    weights["text_projection.weight"][0, 1] = 0.5
    save_file(weights, file, {"format": "pt"})
    asked = {"path": str(spoilt), "guidance_scale": 3.0, "steps": 3}
    config = load_config(tiny_config(teacher=asked, export={"forms": ["pipeline", "single-file"]}))
    with pytest.raises(DataError, match="text_encoder projects its output.*take single-file out of export.forms"):
        run_stage(config, tmp_path / "store", "prompts")
    assert Artifact(str(tmp_path / "store"), "tiny", "prompts").record() is None


def test_stage_stops_when_asked(tiny_config, tmp_path):
    config = load_config(tiny_config())
    with pytest.raises(Stopped):
        export.run(context_for(config, trained_run(config, tmp_path / "store"), "export", stop=lambda: True))
