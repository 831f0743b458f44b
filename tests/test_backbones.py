"""Each family against plain diffusers: the same images from the same noise, for teacher and student."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from dmdr import teacher
from dmdr.errors import DataError
from dmdr.rollout import noise_for, student_sample, teacher_sample

PROMPTS = [
    "a red circle",
    "two blue squares left of a green cross, and a tail of words that only a much longer reader would read to its end",
]


@pytest.fixture(scope="module", params=["sd3", "sd3 without T5", "sdxl", "sdxl that encodes the empty prompt"])
def plain(request, tiny_sd3_folder, tiny_sdxl_folder):
    family, _, special = request.param.partition(" ")
    changes = {
        "without T5": {"text_encoder_3": None, "tokenizer_3": None},  # null tokens are folded
        "that encodes the empty prompt": {"force_zeros_for_empty_prompt": False},
    }.get(special, {})
    pipe = DiffusionPipeline.from_pretrained({"sd3": tiny_sd3_folder, "sdxl": tiny_sdxl_folder}[family], **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def backbone(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    plain.save_pretrained(folder)
    return teacher.load(folder)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_teacher_equals_its_own_pipeline(backbone, plain, guidance_scale):
    noise = noise_for(3, "teacher", shape=(2, *backbone.latent_shape))
    items, truncated = backbone.encode(PROMPTS)
    empty, _ = backbone.encode([""])
    ours = teacher_sample(
        backbone, backbone.collate(items), backbone.collate(empty), guidance_scale=guidance_scale,
        times=backbone.teacher_times(6), noise=noise,
    )  # fmt: skip
    theirs = plain(
        PROMPTS, num_inference_steps=6, guidance_scale=guidance_scale, latents=noise.clone(), output_type="latent"
    ).images
    assert truncated == 1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_student_equals_its_exported_pipeline(backbone, plain, steps):
    exported = backbone.pipeline(backbone.network, backbone.student_scheduler(steps))
    exported.set_progress_bar_config(disable=True)
    start = noise_for(4, "start", shape=(2, *backbone.latent_shape))
    torch.manual_seed(11)
    theirs = exported(
        PROMPTS, num_inference_steps=steps, guidance_scale=1.0, latents=start.clone(), output_type="latent"
    ).images
    torch.manual_seed(11)  # the pipeline draws the renoising noise from torch's global generator
    noises = torch.stack([start, *(torch.randn_like(start) for _ in range(steps - 1))])
    items, _ = backbone.encode(PROMPTS)
    ours = student_sample(backbone, backbone.network, backbone.collate(items), backbone.student_times(steps), noises)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_student_times_are_the_official_ones(backbone, steps):
    """Flow: the shifted linspace of the official demo. SDXL: DMD2's even timesteps, 999, 749, 499, 249 for four."""
    shift = backbone.pipe.scheduler.config.get("shift", 1.0)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    assert torch.allclose(backbone.student_times(steps).double(), shift * t / (1 + (shift - 1) * t), atol=3e-3)


def test_decode_equals_the_pipeline(backbone, plain):
    latents = noise_for(5, "latents", shape=(2, *backbone.latent_shape))
    theirs = plain(
        PROMPTS, latents=latents.clone(), num_inference_steps=1, guidance_scale=1.0, output_type="latent"
    ).images
    shift = plain.vae.config.shift_factor or 0.0
    decoded = plain.vae.decode(theirs / plain.vae.config.scaling_factor + shift).sample
    expected = plain.image_processor.postprocess(decoded.detach(), output_type="pt")
    assert torch.allclose(backbone.decode(theirs), expected, atol=1e-5)


def test_a_teacher_that_predicts_something_else_is_refused(tiny_sdxl_folder, tmp_path):
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    DiffusionPipeline.from_pretrained(tiny_sdxl_folder, scheduler=scheduler).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="predicts v_prediction .*give another teacher"):
        teacher.load(tmp_path)
