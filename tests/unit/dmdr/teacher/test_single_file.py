"""A teacher in one file: the predictions of its folder, and one clear line for a file that is not what it should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr.config.few_steps import FewSteps
from dmdr.config.load import load_config
from dmdr.errors import DataError, InputMissing
from dmdr.export.write import write_form
from dmdr.teacher.load import digest_teacher, family_of, find_teacher, find_teacher_of, load_teacher
from dmdr.teacher.original_layout import LAYOUTS, T5_TIE
from tests.support.trained_run import run_stage, trained_run

PROMPTS = ["a red circle", "a cat that wears a hat", ""]
ASKED = {"guidance_scale": 3.0, "steps": 3}


@pytest.fixture
def one_file(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny teacher as its family publishes it, written by the export."""
    write_form("single-file", load_teacher(tiny_folder), Path(), FewSteps(2), tmp_path, {"modelspec.title": "one"})
    return tmp_path / "single-file" / "one.safetensors"


def without(folder: Path, copy: Path, parts: list[str]) -> Path:
    """A copy of a teacher's folder that has the configuration of `parts` and not their weights."""
    shutil.copytree(folder, copy)
    for part in parts:
        for file in (copy / part).glob("*.safetensors"):
            file.unlink()
    return copy


def rewritten(file: Path, change) -> Path:
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return file


def predictions(source) -> torch.Tensor:
    backbone = load_teacher(source)
    c = backbone.collate(backbone.encode(PROMPTS)[0])
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(PROMPTS), *backbone.latent_shape, generator=generator)
    t = backbone.student_times(FewSteps(4))[:3]
    found = backbone.predict(backbone.network, x_t, t, c)
    return torch.cat([found.flatten(), backbone.decode(found).flatten()])


def test_without_weights_its_network_lies_on_meta(one_file, tiny_folder):
    whole, bare = (load_teacher(find_teacher(str(one_file), str(tiny_folder)), weights=each) for each in (True, False))
    shapes = {name: value.shape for name, value in whole.network.state_dict().items()}
    assert {name: value.shape for name, value in bare.network.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in bare.network.parameters())
    latents = torch.randn(1, whole.latent_shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bare.decode(latents), whole.decode(latents))


def test_it_predicts_exactly_what_the_folder_does(one_file, tiny_folder, tmp_path):
    family = family_of(tiny_folder)
    bare = without(tiny_folder, tmp_path / "bare", list(LAYOUTS[family]))
    assert torch.equal(predictions(find_teacher(str(one_file), str(bare))), predictions(tiny_folder))
    name = next(name for name in load_file(one_file) if name.startswith("model.diffusion_model."))
    other = rewritten(one_file, lambda weights: weights.update({name: weights[name] + 0.1}))
    assert not torch.equal(predictions(find_teacher(str(other), str(bare))), predictions(tiny_folder))


def test_the_parts_give_what_the_file_lacks(one_file, tiny_folder, tmp_path):
    """As the published files without text encoders, or without a VAE."""
    family = family_of(tiny_folder)
    network = next(iter(LAYOUTS[family]))
    prefix = LAYOUTS[family][network].prefix

    def strip(weights: dict) -> None:
        for key in [key for key in weights if not key.startswith(prefix)]:
            del weights[key]

    bare = without(tiny_folder, tmp_path / "bare", [network])
    source = find_teacher(str(rewritten(one_file, strip)), str(bare))
    assert torch.equal(predictions(source), predictions(tiny_folder))
    assert load_teacher(source, text=False).pipe.text_encoder is None
    empty = without(tiny_folder, tmp_path / "empty", [network, "vae"])
    with pytest.raises(
        DataError, match="neither the teacher .* nor its teacher.parts .* has weights of the vae; give parts that"
    ):
        load_teacher(find_teacher(str(one_file), str(empty)))


def test_half_precision_and_what_published_files_have_besides_or_not(one_file, tiny_folder):
    def as_published(weights: dict) -> None:
        for key, weight in weights.items():
            weights[key] = weight.half()
        weights.pop(f"text_encoders.t5xxl.transformer.{T5_TIE}", None)
        weights["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
        weights["model_ema.decay"] = torch.ones(())

    source = find_teacher(str(rewritten(one_file, as_published)), str(tiny_folder))
    backbone = load_teacher(source)
    assert {weight.dtype for weight in backbone.network.state_dict().values()} == {torch.float32}
    assert (predictions(source) - predictions(tiny_folder)).abs().max() < 2e-2


def test_its_digest_covers_the_file_and_the_parts(one_file, tiny_folder, tmp_path):
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    moved = Path(shutil.copy(one_file, tmp_path / "moved.safetensors"))
    first = digest_teacher(find_teacher(str(one_file), str(tiny_folder)))
    assert first == digest_teacher(find_teacher(str(moved), str(copy))), "wherever they lie"
    other = rewritten(Path(shutil.copy(one_file, tmp_path / "other.safetensors")), lambda weights: weights.popitem())
    assert first != digest_teacher(find_teacher(str(other), str(tiny_folder)))
    changed = Path(shutil.copytree(tiny_folder, tmp_path / "changed"))
    (changed / "scheduler" / "scheduler_config.json").write_text("{}")
    assert first != digest_teacher(find_teacher(str(one_file), str(changed)))


def refused(file: Path, parts: Path, *told: str) -> None:
    with pytest.raises(DataError) as said:
        load_teacher(find_teacher(str(file), str(parts)))
    line = str(said.value)
    assert all(each in line for each in told), line
    assert "\n" not in line


def test_a_file_that_is_damaged_is_named(one_file, tiny_folder):
    one_file.write_bytes(one_file.read_bytes()[:-10])
    refused(one_file, tiny_folder, f"teacher file {one_file} is damaged", "fetch the teacher again")
    one_file.write_bytes(b"")
    refused(one_file, tiny_folder, f"teacher file {one_file} is damaged", "0 bytes")


@pytest.mark.parametrize("part", ["network", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_tensor_and_another_shape_are_named(part, one_file, tiny_folder):
    layout = LAYOUTS[family_of(tiny_folder)]
    prefix = layout[next(iter(layout)) if part == "network" else part].prefix
    whole = load_file(one_file)
    names = sorted(key for key in whole if key.startswith(prefix))
    name = names[len(names) // 2]
    save_file({**whole, name: torch.zeros(*whole[name].shape, 2)}, one_file)
    shapes = (str((*whole[name].shape, 2)), str(tuple(whole[name].shape)))
    refused(one_file, tiny_folder, f"has {name} of shape", *shapes, "give teacher.parts of exactly this model")
    del whole[name]
    save_file(whole, one_file)
    refused(one_file, tiny_folder, f"lacks the tensor {name}, which", "fetch the file again, or give teacher.parts")


def test_a_file_of_another_family_is_told(one_file, tiny_folder, tiny_sd3_folder, tiny_sdxl_folder, tiny_flux_folder):
    other = tiny_sdxl_folder if tiny_folder == tiny_sd3_folder else tiny_sd3_folder
    refused(one_file, other, f"is no {family_of(other)} file", "give teacher.parts of the file's own family")
    refused(one_file, tiny_flux_folder, "teacher.parts", "is of the family flux", "give a diffusers folder")


def test_what_is_not_there_is_told(one_file, tmp_path):
    with pytest.raises(InputMissing, match="teacher.path gone.safetensors: no such file; give a .safetensors file"):
        find_teacher("gone.safetensors", "lab:flow")
    with pytest.raises(InputMissing, match="teacher.parts .*nowhere: no such folder"):
        find_teacher(str(one_file), str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="teacher.parts .* has no model_index.json"):
        find_teacher(str(one_file), str(tmp_path))


def test_a_run_from_one_file_exports_the_student(one_file, tiny_folder, tiny_config, tmp_path):
    """And its LoRA is compared on the teacher as it is: the file."""
    student = {"steps": 2, "form": "lora", "lora_rank": 4}
    asked = {"path": str(one_file), "parts": str(tiny_folder), **ASKED}
    config = load_config(
        tiny_config(teacher=asked, student=student, export={"forms": ["pipeline", "lora", "single-file"]})
    )
    folder = run_stage(config, trained_run(config, tmp_path / "store"), "export")
    facts = json.loads((folder / "provenance.json").read_text())
    assert max(facts["parity"].values()) <= 1e-4
    named = {"name": one_file.name, "parts": tiny_folder.name}
    assert facts["teacher"] == {"digest": digest_teacher(find_teacher_of(config.teacher)), **named}
    card = (folder / "lora" / "README.md").read_text()
    snippet = card.split("## lora")[1].split("```python\n")[1].split("```")[0]
    places = {one_file.name: one_file, tiny_folder.name: tiny_folder, "image.png": tmp_path / "image.png"}
    places |= {name: folder / name for name in ("lora", "lora/scheduler")}
    for name, place in places.items():
        snippet = snippet.replace(f'"{name}"', repr(str(place)))
    exec(snippet, {})
    assert (tmp_path / "image.png").is_file()


EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def scale_down(weights: dict[str, torch.Tensor], end: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Store every matrix in 8 bits with a scale beside it, as ComfyUI's files have it; returns the weights it means."""
    means = {}
    for name, weight in list(weights.items()):
        means[name] = weight
        if name.endswith(".weight") and weight.ndim == 2 and "embedding" not in name:
            scale = weight.abs().max() / 100
            weights[name] = (weight / scale).to(dtype)
            layer = name.removesuffix(".weight")
            weights[f"{layer}{end}"] = scale.reshape(()) if end == ".scale_weight" else scale.reshape(1)
            weights[f"{layer}.scale_input"] = torch.ones(())
            means[name] = weights[name].float() * scale
            if end == ".weight_scale":
                text = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
                weights[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if end == ".scale_weight":
        weights["scaled_fp8"] = torch.zeros(2).to(dtype)
    return means


@pytest.mark.parametrize(("end", "dtype"), [(".scale_weight", EIGHT_BITS[0]), (".weight_scale", EIGHT_BITS[1])])
def test_8_bit_weights_are_read_with_their_scales(one_file, tiny_folder, tmp_path, end, dtype):
    """As diffusers draws with a file of the weights that they mean; without the scales it would draw something else."""
    bare = without(tiny_folder, tmp_path / "bare", list(LAYOUTS[family_of(tiny_folder)]))
    weights, plain, raw = load_file(one_file), tmp_path / "plain.safetensors", tmp_path / "raw.safetensors"
    means = scale_down(weights, end, dtype)
    scaled = tmp_path / "scaled.safetensors"
    save_file(weights, scaled)
    save_file(means, plain)
    save_file({name: weights[name] for name in means}, raw)
    found, expected, wrong = (predictions(find_teacher(str(file), str(bare))) for file in (scaled, plain, raw))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, wrong, atol=0.01)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w, n: w.update({f"{n}.scale_weight": torch.ones(4)}), "one scale each"),
        (lambda w, n: w.update({f"{n}.weight": w[f"{n}.weight"].float()}), "is torch.float32"),
        (lambda w, n: w.update({"x.scale_weight": torch.ones(())}), "x.weight is not there"),
        (lambda w, n: w.update({f"{n}.weight_scale_2": torch.ones(())}), "scales of their own"),
        (
            lambda w, n: w.update({f"{n}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}),
            "in the format 'nvfp4'",
        ),
        (lambda w, n: w.update({f"{n}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}), "in the format 'unknown'"),
    ],
)
def test_8_bit_weights_of_another_kind_are_refused(one_file, tiny_folder, change, told):
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        scale_down(weights, ".scale_weight", EIGHT_BITS[0])
        name = next(name for name in weights if name.endswith(".scale_weight")).removesuffix(".scale_weight")
        change(weights, name)

    rewritten(one_file, spoil)
    with pytest.raises(DataError, match=told) as caught:
        load_teacher(find_teacher(str(one_file), str(tiny_folder)))
    assert "\n" not in str(caught.value)
