"""What a teacher's files say is drawn as plain diffusers draws it, or refused in one line that names it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dmdr.config.few_steps import FewSteps
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.export.comfyui import build_workflow
from dmdr.export.parity import compare_latents
from dmdr.export.teacher_parity import compare_teacher, draw, draw_by_pipeline
from dmdr.export.write import save_single_file
from dmdr.teacher.load import find_teacher, load_teacher, note_sampler

NETWORK = {"sd3": "transformer", "sdxl": "unet", "z_image": "transformer", "flux": "transformer"}
SIDE = 32  # pixels


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the tiny teacher of a family, to be changed."""

    def make(family: str) -> Path:
        source = request.getfixturevalue(f"tiny_{family}_folder")
        return Path(shutil.copytree(source, tmp_path / family, dirs_exist_ok=True))

    return make


def edit(file: Path, **changes: object) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | changes))


def accept(folder: Path) -> None:
    """Load it and compare it with plain diffusers; whatever is refused raises."""
    backbone = load_teacher(find_teacher(str(folder)), resolution=SIDE)
    compare_teacher(backbone, guidance_scale=3.0, few=FewSteps(2))


def test_every_family_passes_the_door(copy: Callable[[str], Path]):
    for family in NETWORK:
        accept(copy(family))


SCHEDULERS = [  # family, settings, what is told
    ("sd3", {"invert_sigmas": True}, "invert_sigmas: true"),
    ("sd3", {"use_karras_sigmas": True}, "use_karras_sigmas: true"),
    ("sd3", {"shift_terminal": 0.02}, "shift_terminal: 0.02"),
    ("sd3", {"num_train_timesteps": 500}, "num_train_timesteps: 500"),
    ("sd3", {"stochastic_sampling": True}, "stochastic_sampling: true"),
    ("z_image", {"use_beta_sigmas": True}, "use_beta_sigmas: true"),
    ("flux", {"use_exponential_sigmas": True}, "use_exponential_sigmas: true"),
    ("sdxl", {"prediction_type": "sample"}, "predicts .sample. .*epsilon or v_prediction"),
    ("sdxl", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type epsilon"),
    ("sdxl", {"use_karras_sigmas": True}, "use_karras_sigmas: true"),
    ("sdxl", {"timestep_type": "continuous"}, "timestep_type: .continuous."),
    ("sdxl", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type: .sigma_min."),
]


@pytest.mark.parametrize(("family", "settings", "told"), SCHEDULERS)
def test_a_setting_of_the_scheduler_that_is_not_sampled_is_refused(copy, family, settings, told):
    folder = copy(family)
    edit(folder / "scheduler/scheduler_config.json", **settings)
    with pytest.raises(DataError, match=told) as refused:
        load_teacher(folder, resolution=SIDE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sdxl", "EDMEulerScheduler"),
        ("sdxl", "EDMDPMSolverMultistepScheduler"),
        ("sdxl", "LCMScheduler"),
        ("sdxl", "TCDScheduler"),
        ("sd3", "FlowMatchHeunDiscreteScheduler"),
        ("flux", "FlowMatchLCMScheduler"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(copy, family, kind):
    folder = copy(family)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.register_modules(scheduler=getattr(diffusers, kind)())
    pipe.scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    with pytest.raises(DataError, match=f"is sampled with {kind} .* give a teacher of that scheduler"):
        load_teacher(folder, resolution=SIDE)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_another_sampler_of_the_same_schedule_is_told(copy, kind):
    folder = copy("sdxl")
    assert note_sampler(folder) is None
    scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    assert f"own scheduler is {kind}; DMDR samples the teacher with EulerDiscreteScheduler" in note_sampler(folder)
    accept(folder)
    edit(folder / "scheduler/scheduler_config.json", prediction_type="flow_prediction")
    with pytest.raises(DataError, match="predicts .flow_prediction."):
        load_teacher(folder, resolution=SIDE)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_an_sdxl_that_predicts_v_is_drawn_as_its_pipeline_draws_it(copy, zero_snr, steps):
    folder = copy("sdxl")
    plain = draw(load_teacher(folder, resolution=SIDE), 3.0)
    spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", **spacing)
    backbone = load_teacher(folder, resolution=SIDE)
    ours, (theirs, _) = draw(backbone, 3.0), draw_by_pipeline(backbone, 3.0)
    allowed = 1e-3 if zero_snr else 1e-4  # diffusers multiplies by a sigma of 4,096 there, and float32 has 24 bits
    assert (ours - theirs).abs().max() < allowed
    assert (ours - plain).abs().max() > 0.1
    student = backbone.build_student_pipeline(backbone.network, FewSteps(steps))
    assert compare_latents(backbone, backbone.network, FewSteps(steps), student, seed=1) < 1e-4
    accept(folder)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_one_file_says_what_it_predicts(copy, tmp_path, zero_snr):
    """Our own export of a teacher that predicts v, read again; with parts that say otherwise it is refused."""
    folder, epsilon = copy("sdxl"), Path(shutil.copytree(copy("sdxl"), tmp_path / "epsilon"))
    spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", **spacing)
    backbone = load_teacher(folder, resolution=SIDE)
    assert build_workflow("single-file", backbone, FewSteps(4), title="one", teacher="t", prompt="p") is None
    file = tmp_path / "new/one.safetensors"
    save_single_file(backbone, file, {"format": "pt"})
    again = load_teacher(find_teacher(str(file), str(folder)), resolution=SIDE)
    assert torch.equal(draw(again, 3.0), draw(backbone, 3.0))
    with pytest.raises(DataError, match="says that it predicts v, but .* prediction_type epsilon; give parts with"):
        load_teacher(find_teacher(str(file), str(epsilon)), resolution=SIDE)
    if zero_snr:
        edit(epsilon / "scheduler/scheduler_config.json", prediction_type="v_prediction")
        with pytest.raises(DataError, match="zero terminal SNR .*rescale_betas_zero_snr: true"):
            load_teacher(find_teacher(str(file), str(epsilon)), resolution=SIDE)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_an_sd3_with_dynamic_shifting_is_drawn_as_its_pipeline_draws_it(copy, time_shift_type):
    folder = copy("sd3")
    plain = load_teacher(folder, resolution=SIDE).teacher_times(4)
    edit(folder / "scheduler/scheduler_config.json", use_dynamic_shifting=True, time_shift_type=time_shift_type)
    shifted = load_teacher(folder, resolution=SIDE)
    assert not torch.allclose(shifted.teacher_times(4), plain, atol=1e-2)
    ours, (theirs, _) = draw(shifted, 3.0), draw_by_pipeline(shifted, 3.0)
    assert (ours - theirs).abs().max() < 1e-4
    accept(folder)


@pytest.mark.parametrize("family", NETWORK)
def test_half_precision_variants_are_read(copy, family):
    """As `save_pretrained(variant="fp16")` and downloads of `*.fp16.safetensors` leave them."""
    folder = copy(family)
    before = load_teacher(folder, resolution=SIDE)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    pipe.save_pretrained(folder, variant="fp16")
    assert all(".fp16" in file.name for file in folder.rglob("*.safetensors"))
    after = load_teacher(folder, resolution=SIDE)
    assert {p.dtype for p in after.network.parameters()} == {torch.float32}
    a, b = draw(before, 3.0), draw(after, 3.0)
    assert 0 < (a - b).abs().max() < 0.1
    compare_teacher(after, guidance_scale=3.0, few=FewSteps(2))


def rename(file: Path, change: Callable[[str], str]) -> None:
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def add(file: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(file), name: tensor}, file, {"format": "pt"})


def weights(folder: Path) -> Path:
    (file,) = (folder / NETWORK[folder.name]).glob("*.safetensors")
    return file


def to_pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "compiled": (lambda folder: rename(weights(folder), "_orig_mod.{}".format), "saved from a compiled network"),
    "adapters": (
        lambda folder: rename(weights(folder), lambda name: name.replace(".weight", ".base_layer.weight")),
        "adapters are not fused",
    ),
    "scaled": (lambda folder: add(weights(folder), "a.scale_weight", torch.ones(1)), "scales of their own"),
    "pickle": (lambda folder: to_pickle(weights(folder)), "are a pickle .*only safetensors"),
    "encoder-pickle": (
        lambda folder: to_pickle(next((folder / "text_encoder").glob("*.safetensors"))),
        "text_encoder are a pickle",
    ),
    "none": (lambda folder: weights(folder).unlink(), "has no weights"),
    "variant": (
        lambda folder: weights(folder).rename(weights(folder).with_name("diffusion_pytorch_model.int8.safetensors")),
        "only the variant int8",
    ),
    "code": (
        lambda folder: edit(folder / "model_index.json", **{NETWORK[folder.name]: ["my_net", "UNet2DConditionModel"]}),
        "my_net.UNet2DConditionModel, code of its own, which is never run",
    ),
    "class": (
        lambda folder: edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        "its vae is a AutoencoderTiny",
    ),
    "entry": (lambda folder: edit(folder / "model_index.json", vae=["diffusers"]), "says .* of vae"),
    "index-list": (lambda folder: (folder / "model_index.json").write_text("[]"), "no JSON object"),
    "class-list": (
        lambda folder: edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"]),
        "is a MyPipeline; DMDR knows",
    ),
    "auto-map": (
        lambda folder: edit(folder / "text_encoder/config.json", auto_map={"AutoModel": "code.Model"}),
        "auto_map.*never run",
    ),
    "quantised": (
        lambda folder: edit(folder / f"{NETWORK[folder.name]}/config.json", quantization_config={"bits": 4}),
        "are quantised",
    ),
    "latents": (
        lambda folder: edit(folder / "vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "latents_mean",
    ),
    "scaling": (lambda folder: edit(folder / "vae/config.json", scaling_factor=None), "scaling_factor None"),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_what_is_no_plain_teacher_is_refused(copy, family, spoil, capsys):
    folder, (change, told) = copy(family), SPOILS[spoil]
    change(folder)
    with pytest.raises(DataError, match=told) as refused:
        load_teacher(folder, resolution=SIDE)
    assert "\n" not in str(refused.value)


def test_code_beside_the_weights_is_not_run(copy, tmp_path):
    folder = copy("sdxl")
    (folder / "unet/my_unet.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    edit(folder / "model_index.json", unet=["my_unet", "UNet2DConditionModel"])
    with pytest.raises(DataError):
        load_teacher(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("size", "taken"), [([8, 8], True), ([8, 16], False), (None, False), ("8", False)])
def test_a_size_that_is_no_number(copy, size, taken):
    folder = copy("sdxl")
    edit(folder / "unet/config.json", sample_size=size)
    if taken:
        assert load_teacher(folder).latent_shape[1:] == (8, 8)
    else:
        with pytest.raises(DataError, match="sample_size .*set teacher.resolution"):
            load_teacher(folder)
    assert load_teacher(folder, resolution=SIDE).resolution == SIDE


@pytest.mark.parametrize("channels", [8, 9])
def test_a_unet_for_editing_or_inpainting_is_refused(copy, channels):
    folder = copy("sdxl")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    diffusers.UNet2DConditionModel.from_config({**unet.config, "in_channels": channels}).save_pretrained(
        folder / "unet"
    )
    with pytest.raises(DataError, match=rf"takes {channels} channels, .*inpainting, editing"):
        load_teacher(folder)


VALUES = (None, True, False, 0, 1, 7, -1, 0.3, 1e9, "linear", "v_prediction", "", [], [1, 2], {})


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORK)
def test_whatever_a_file_says_is_drawn_as_diffusers_draws_it_or_refused(copy, family, capsys):
    """Keys of a component's configuration that are gone, of another type or another value: no other error."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, folder, outcomes = random.Random(seed), copy(family), {"taken": 0, "refused": 0}
    files = [folder / "scheduler/scheduler_config.json", folder / "vae/config.json", folder / "model_index.json"]
    files.append(folder / NETWORK[family] / "config.json")
    for _ in range(25):
        file = rng.choice(files)
        before = file.read_text()
        data = json.loads(before)
        key, how = rng.choice([*data]), rng.choice(["drop", "change", "change"])
        if how == "drop":
            del data[key]
        else:
            data[key] = rng.choice(VALUES)
        file.write_text(json.dumps(data))
        told = f"{file.relative_to(folder)} {key}: {data.get(key, 'gone')!r}"
        try:
            accept(folder)
            outcomes["taken"] += 1
        except (DataError, InputMissing, ConfigError) as error:
            assert "\n" not in str(error), told
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {told} was neither taken nor refused") from error
        file.write_text(before)
    print(outcomes)
