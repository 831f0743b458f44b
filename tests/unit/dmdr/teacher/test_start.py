"""What a student starts from: found, checked by headers, and in the student before it is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.config.lora import LoraForm, LoraForms
from dmdr.config.start import Start
from dmdr.config.student import Student
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.export.write import build_metadata, load_student, write_form
from dmdr.planning.meta import build_from_configs
from dmdr.shared_base import STUDENT, SharedBase
from dmdr.teacher.load import digest_teacher
from dmdr.teacher.original_layout import LAYOUTS
from dmdr.teacher.start_check import check_start
from dmdr.teacher.start_files import digest_start, find_start
from tests.support.tiny_teachers import copy_teacher
from tests.support.trained_run import WEIGHTS, full_student, lora_student

FAMILIES = ("sd3", "sdxl", "z_image", "flux")
RANK = 4
FEW = FewSteps(4)  # of the exported students


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def export(place: Path, folder: Path, form: str, *, is_lora: bool = False) -> tuple[Path, Backbone]:
    """A form of a student as a run exports it, and the student in the teacher's place."""
    backbone = copy_teacher(folder, 16)
    make = lora_student if is_lora else full_student
    make(place / "trained", folder)
    load_student(backbone.network, place / "trained")
    metadata = build_metadata(backbone, FEW, title="some", teacher=digest_teacher(folder))
    write_form(form, backbone, place / "trained" / WEIGHTS, FEW, place / "export", metadata)
    return place / "export" / form, backbone


def begin(folder: Path, path: Path, *, rank: int | None = None, scale: float = 1.0) -> SharedBase:
    """A student at its start, as a training stage has it before its first update."""
    base = SharedBase(copy_teacher(folder, 16), fake_rank=2, fake_scale=2.0, student_rank=rank, seed=0)
    start = Start(path=str(path), scale=scale)
    base.begin_at(find_start(start, "full" if rank is None else "lora"), scale=scale)
    return base


def assert_same(network: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = network.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def predict(base: SharedBase) -> torch.Tensor:
    """The student's x0 of fixed noise."""
    return predict_with(base.backbone, lambda *inputs: base.student(*inputs))


def predict_with(backbone: Backbone, student: Callable[..., torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(2, *backbone.latent_shape, generator=generator)
    c = backbone.collate([backbone.blank(), backbone.blank()])
    c = {name: torch.randn(value.shape, generator=generator) if value.ndim > 2 else value for name, value in c.items()}
    with torch.no_grad():
        return student(x_t, torch.tensor([0.9, 0.4]), c)


@pytest.mark.parametrize("form", ["pipeline", "weights"])
def test_a_full_student_begins_at_exactly_the_exported_network(tmp_path: Path, folder: Path, form: str) -> None:
    path, theirs = export(tmp_path, folder, form)
    base = begin(folder, path)
    assert_same(base.student_network, theirs.network)
    assert all(parameter.requires_grad for parameter in base.student_parameters.values())


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_file_in_the_names_of_its_family_is_the_same_start(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, prefix: str
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    _, theirs = export(tmp_path, folder, "weights")
    layout = next(iter(LAYOUTS[family].values()))
    named = layout.rename(theirs.network.state_dict())
    save_file({f"{prefix}{key}": value.contiguous() for key, value in named.items()}, tmp_path / "one.safetensors")
    assert_same(begin(folder, tmp_path / "one.safetensors").student_network, theirs.network)


def test_z_images_own_names_are_the_same_start(tmp_path: Path, tiny_z_image_folder: Path) -> None:
    _, theirs = export(tmp_path, tiny_z_image_folder, "weights")
    weights, own = theirs.network.state_dict(), {}
    for name, value in weights.items():
        if ".to_q." in name:
            parts = [weights[name.replace("to_q", each)] for each in ("to_q", "to_k", "to_v")]
            own[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif not any(each in name for each in (".to_k.", ".to_v.")):
            for ours, original in {
                "all_final_layer.2-1.": "final_layer.",
                "all_x_embedder.2-1.": "x_embedder.",
                "attention.to_out.0.": "attention.out.",
                "norm_k": "k_norm",
                "norm_q": "q_norm",
            }.items():
                name = name.replace(ours, original)
            own[name] = value
    assert own.keys() != weights.keys()
    save_file({name: value.contiguous() for name, value in own.items()}, tmp_path / "one.safetensors")
    assert_same(begin(tiny_z_image_folder, tmp_path / "one.safetensors").student_network, theirs.network)


def test_a_whole_checkpoint_gives_its_network(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    path, theirs = export(tmp_path, tiny_sdxl_folder, "single-file")
    assert_same(begin(tiny_sdxl_folder, path).student_network, theirs.network)


def test_a_half_precision_start_is_what_its_file_says(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    _, theirs = export(tmp_path, tiny_sd3_folder, "weights")
    half = {name: value.bfloat16() for name, value in theirs.network.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    student = begin(tiny_sd3_folder, tmp_path / "half.safetensors").student_network.state_dict()
    assert all(value.dtype == torch.float32 for value in student.values())
    assert all(torch.equal(student[name], value.float()) for name, value in half.items())


def test_a_lora_is_fused_into_a_full_student(tmp_path: Path, folder: Path) -> None:
    path, theirs = export(tmp_path, folder, "lora", is_lora=True)
    base = begin(folder, path)
    for name, value in theirs.network.state_dict().items():
        torch.testing.assert_close(base.student_network.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_alpha_and_scale_are_those_of_diffusers(tmp_path: Path, folder: Path, scale: float) -> None:
    from peft import LoraConfig

    theirs = copy_teacher(folder, 16)
    config = LoraConfig(r=RANK, lora_alpha=10, target_modules=["to_q", "to_k"], init_lora_weights=False)
    theirs.network.add_adapter(config, adapter_name="theirs")
    theirs.network.save_lora_adapter(tmp_path / "lora", adapter_name="theirs")
    full, lora = (begin(folder, tmp_path / "lora", rank=rank, scale=scale) for rank in (None, RANK))
    theirs.network.fuse_lora(lora_scale=scale)
    theirs.network.unload_lora()
    assert_same(full.student_network, theirs.network)
    expected = predict_with(theirs, lambda *inputs: theirs.predict_x0(theirs.network, *inputs))
    torch.testing.assert_close(predict(lora), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(predict(full), expected, rtol=0, atol=1e-6)


def test_a_lora_goes_on_and_is_exported_as_the_same_function(tmp_path: Path, folder: Path) -> None:
    path, theirs = export(tmp_path, folder, "lora", is_lora=True)
    base = begin(folder, path, rank=RANK)
    expected = predict_with(theirs, lambda *inputs: theirs.predict_x0(theirs.network, *inputs))
    torch.testing.assert_close(predict(base), expected, rtol=0, atol=2e-5)
    again = tmp_path / "again"
    again.mkdir()
    save_file(base.to_diffusers(STUDENT, dict(base.student_parameters)), again / WEIGHTS)
    (again / "student.json").write_text(json.dumps({"form": "lora"}))
    exported = copy_teacher(folder, 16)
    load_student(exported.network, again)
    drawn = predict_with(exported, lambda *inputs: exported.predict_x0(exported.network, *inputs))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-5)


def test_the_forms_of_an_export_are_chosen_by_the_student(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    export(tmp_path, tiny_sd3_folder, "lora", is_lora=True)
    export(tmp_path, tiny_sd3_folder, "pipeline", is_lora=True)
    (tmp_path / "export" / "provenance.json").write_text("{}")
    start = Start(path=str(tmp_path / "export"))
    assert find_start(start, "lora").files[0].parent.name == "lora"
    assert find_start(start, "full").files[0].parent.name == "transformer"
    assert find_start(Start(path=str(tmp_path)), "lora").files[0].parent.name == "lora"  # the folder of the whole run


def test_the_identity_is_the_content_of_the_weights(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    path, theirs = export(tmp_path, tiny_sd3_folder, "weights")

    def identify(place: Path) -> str:
        return digest_start(find_start(Start(path=str(place)), "full"))

    before = identify(path)
    shutil.copytree(path, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("another text")
    (tmp_path / "elsewhere" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert identify(tmp_path / "elsewhere") == before
    weights = {name: value.clone() for name, value in theirs.network.state_dict().items()}
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    assert identify(tmp_path / "other.safetensors") != before


# --- what does not fit


def refuse(folder: Path, path: Path | str, **student: object) -> str:
    """The one line that refuses a start, before any weights of a network are read."""
    settings = Student.model_validate({"steps": 4, **student, "start": {"path": str(path), **student.pop("start", {})}})
    with pytest.raises((ConfigError, DataError, InputMissing)) as refused:
        check_start(settings, build_from_configs(folder), folder, trains_at_once=True)
    line = str(refused.value)
    assert "\n" not in line and str(path) in line
    return f"{type(refused.value).__name__}: {line}"


def test_a_start_of_another_architecture_is_refused(
    tmp_path: Path, tiny_sd3_folder: Path, tiny_sdxl_folder: Path, tiny_flux_folder: Path
) -> None:
    for other in (tiny_sdxl_folder, tiny_flux_folder):
        assert refuse(tiny_sd3_folder, other).startswith("DataError")
        assert refuse(other, tiny_sd3_folder).startswith("DataError")
    path, theirs = export(tmp_path, tiny_sd3_folder, "weights")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "attention_head_dim": 8}))
    assert "attention_head_dim: 8" in refuse(tiny_sd3_folder, path)  # which no shape tells


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    _, theirs = export(tmp_path, tiny_folder, "weights")
    weights, file = theirs.network.state_dict(), tmp_path / "one.safetensors"
    first = sorted(weights)[0]
    cases = {
        f"lacks the tensor {first}": {name: value for name, value in weights.items() if name != first},
        "has the tensor extra.weight": {**weights, "extra.weight": torch.zeros(2)},
        "of shape (7,)": {**weights, first: torch.zeros(7)},
    }
    for words, tensors in cases.items():
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        assert words in refuse(tiny_folder, file)


def test_files_that_are_not_read_are_refused(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    path, theirs = export(tmp_path, tiny_sd3_folder, "weights")
    weights = theirs.network.state_dict()
    pickle = tmp_path / "dmd2_sdxl_4step_unet_fp16.bin"
    pickle.write_bytes(b"\x80\x02}.")
    assert "pickle" in refuse(tiny_sd3_folder, pickle)
    (path / "diffusion_pytorch_model.safetensors").rename(path / "diffusion_pytorch_model.bin")
    assert "pickle (diffusion_pytorch_model.bin)" in refuse(tiny_sd3_folder, path)
    quantised = {"a": {**weights, sorted(weights)[0]: weights[sorted(weights)[0]].to(torch.float8_e4m3fn)}}
    quantised["b"] = {**weights, "proj_out.weight.absmax": torch.zeros(3)}
    quantised["c"] = {name: (value * 9).to(torch.int8) for name, value in weights.items()}
    for name, tensors in quantised.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert "quantised" in refuse(tiny_sd3_folder, tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:2000])
    assert "damaged" in refuse(tiny_sd3_folder, tmp_path / "cut.safetensors")
    (tmp_path / "note.txt").write_text("no weights")
    assert "no .safetensors" in refuse(tiny_sd3_folder, tmp_path / "note.txt")


def test_places_without_a_start_are_refused(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    assert refuse(tiny_sd3_folder, tmp_path / "nowhere").startswith("InputMissing")
    assert refuse(tiny_sd3_folder, "hub:tianweiy/DMD2").startswith("ConfigError")
    (tmp_path / "empty").mkdir()
    assert "no weights" in refuse(tiny_sd3_folder, tmp_path / "empty")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / "empty" / f"{name}.safetensors")
    assert "name the file itself" in refuse(tiny_sd3_folder, tmp_path / "empty")


def test_loras_that_do_not_fit_are_refused(tmp_path: Path, tiny_sd3_folder: Path, tiny_flux_folder: Path) -> None:
    path, _ = export(tmp_path, tiny_sd3_folder, "lora", is_lora=True)
    file = path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    assert "DataError" in refuse(tiny_flux_folder, path)  # of another teacher, by the digest that our files carry

    def refuse_changed(changed: dict[str, torch.Tensor], folder: Path = tiny_sd3_folder, **student: object) -> str:
        save_file(changed, tmp_path / "lora.safetensors")  # without the metadata of our files
        return refuse(folder, tmp_path / "lora.safetensors", **student)

    lora = {"form": "lora", "lora_rank": RANK}
    assert "does not have" in refuse_changed(tensors, tiny_flux_folder)
    renamed = {name.replace("attn.to_q", "attn.to_elsewhere"): value for name, value in tensors.items()}
    assert "to_elsewhere" in refuse_changed(renamed)
    assert "does not fit the teacher's module" in refuse_changed({n: torch.zeros(5, 5) for n in tensors})
    assert "one half" in refuse_changed({name: value for name, value in tensors.items() if "lora_B" not in name})
    assert "text encoder" in refuse_changed({**tensors, "text_encoder.a.lora_A.weight": torch.zeros(2, 2)})
    assert "not of a plain LoRA" in refuse_changed({**tensors, "transformer.x.lokr_w1": torch.zeros(2, 2)})
    assert "set student.lora_rank: 4" in refuse_changed(tensors, **{**lora, "lora_rank": 8})
    wide = {
        f"transformer.transformer_blocks.0.ff.net.2.lora_{side}.weight": torch.zeros(shape)
        for side, shape in {"A": (RANK, 128), "B": (32, RANK)}.items()
    }
    assert "student.lora_targets" in refuse_changed({**tensors, **wide}, **lora)
    full, _ = export(tmp_path / "full", tiny_sd3_folder, "weights")
    assert "set form: full" in refuse(tiny_sd3_folder, full, **lora)
    assert "holds no LoRA" in refuse(tiny_sd3_folder, full, start={"scale": 0.5})


# --- how it samples


def compare(folder: Path, path: Path, *, steps: int = 4, trains_at_once: bool = True, **student: object) -> list[str]:
    settings = Student.model_validate({"steps": steps, "start": {"path": str(path)}, **student})
    return check_start(settings, build_from_configs(folder, 16), folder, trains_at_once=trains_at_once)


@pytest.mark.parametrize("form", ["weights", "pipeline"])
def test_an_export_that_samples_as_the_config_draws_no_line(tmp_path: Path, folder: Path, form: str) -> None:
    path, _ = export(tmp_path, folder, form)
    assert compare(folder, path) == []
    if form == "weights":
        assert "was made for 4 steps" in compare(folder, path, steps=2)[0]


def test_an_export_with_other_times_is_refused_or_told(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    path, theirs = export(tmp_path, tiny_sd3_folder, "weights")
    file = path / "diffusion_pytorch_model.safetensors"
    metadata = build_metadata(theirs, FEW, title="some", teacher="0" * 64)
    config = json.dumps({**json.loads(metadata["dmdr.scheduler_config"]), "stochastic_sampling": False})
    other = {**metadata, "dmdr.timesteps": "[1000.0, 800.0, 500.0, 200.0]", "dmdr.scheduler_config": config}
    save_file(theirs.network.state_dict(), file, other)
    with pytest.raises(ConfigError, match=r"student.timesteps: \[1000, 800, 500, 200\], student.eta: 0"):
        compare(tiny_sd3_folder, path)
    (line,) = compare(tiny_sd3_folder, path, trains_at_once=False)
    assert "student.timesteps: [1000, 800, 500, 200]" in line


def test_somebodys_scheduler_draws_a_line_and_no_refusal(tmp_path: Path, tiny_z_image_folder: Path) -> None:
    shutil.copytree(tiny_z_image_folder, tmp_path / "turbo")
    file = tmp_path / "turbo" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 3.0}))
    line = compare(tiny_z_image_folder, tmp_path / "turbo")[0]
    assert "student.shift: 3, student.eta: 0" in line


def test_the_teacher_itself_draws_a_line(tiny_sd3_folder: Path) -> None:
    lines = compare(tiny_sd3_folder, tiny_sd3_folder)
    assert any("is the teacher itself" in line for line in lines)
    assert not any("itself" in line for line in compare(tiny_sd3_folder, tiny_sd3_folder, trains_at_once=False))


def test_another_prediction_is_refused(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    shutil.copytree(tiny_sdxl_folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(DataError, match="predicts v_prediction"):
        compare(tiny_sdxl_folder, tmp_path / "v")


def test_a_student_of_another_alpha_draws_the_same(tmp_path: Path, tiny_sd3_folder: Path) -> None:
    path, theirs = export(tmp_path, tiny_sd3_folder, "lora", is_lora=True)
    lora = LoraForms(LoraForm(), LoraForm(alpha=10.0))
    base = SharedBase(
        copy_teacher(tiny_sd3_folder, 16), fake_rank=2, fake_scale=2.0, student_rank=RANK, seed=0, lora=lora
    )
    base.begin_at(find_start(Start(path=str(path)), "lora"), scale=1.0)
    expected = predict_with(theirs, lambda *inputs: theirs.predict_x0(theirs.network, *inputs))
    torch.testing.assert_close(predict(base), expected, rtol=0, atol=2e-5)
    exported = base.to_diffusers(STUDENT, dict(base.student_parameters))
    trained = load_file(tmp_path / "trained" / WEIGHTS)
    assert exported.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-6)
