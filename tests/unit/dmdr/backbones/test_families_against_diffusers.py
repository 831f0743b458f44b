"""Each family against plain diffusers: the same images from the same noise, for teacher and student."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from dmdr import losses
from dmdr.config.few_steps import FewSteps
from dmdr.errors import ConfigError, DataError
from dmdr.noise import noise_for
from dmdr.optimizers import Trainable
from dmdr.rollout import note_one_step, sample_student, sample_teacher
from dmdr.shared_base import SharedBase
from dmdr.teacher.load import load_teacher
from dmdr.update import Levels, RealScore, WeightedLoss, roll_out, select_states, update_student

PROMPTS = [
    "a red circle",
    "two blue squares left of a green cross" + ", and a tail of words that only a much longer reader reads" * 9,
]
RESOLUTION = 16


@pytest.fixture(
    scope="module",
    params=["sd3", "sd3 without T5", "sdxl", "sdxl that encodes the empty prompt", "z_image", "flux", "flux schnell"],
)
def plain(request):
    family, _, special = request.param.partition(" ")
    changes = {
        "without T5": {"text_encoder_3": None, "tokenizer_3": None},  # null tokens are folded
        "that encodes the empty prompt": {"force_zeros_for_empty_prompt": False},
    }.get(special, {})
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(f"tiny_{family}_folder"), **changes)
    if special == "schnell":  # its transformer takes no guidance
        config = {**pipe.transformer.config, "guidance_embeds": False}
        pipe.register_modules(transformer=type(pipe.transformer).from_config(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def backbone(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    plain.save_pretrained(folder)
    return load_teacher(folder, resolution=RESOLUTION)


def drawn_by(
    pipe: DiffusionPipeline, backbone, latents: torch.Tensor, steps: int, scale: float, **more: list
) -> torch.Tensor:
    """The latents that the family's own pipeline ends with; `scale` as all of DMDR has it, 1 for no guidance."""
    asked = {"guidance_scale": scale - 1.0 if backbone.family == "z-image" else scale}
    if backbone.family == "flux" and not backbone.guidance_is_input:
        asked = {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)}
    found = pipe(
        list(PROMPTS),
        num_inference_steps=steps,
        latents=backbone.to_pipeline(latents.clone()),
        output_type="latent",
        height=RESOLUTION,
        width=RESOLUTION,
        **asked,
        **more,
    ).images
    return backbone.from_pipeline(found)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_teacher_equals_its_own_pipeline(backbone, plain, guidance_scale):
    noise = noise_for(3, "teacher", shape=(2, *backbone.latent_shape))
    items, truncated = backbone.encode(PROMPTS)
    empty, _ = backbone.encode([""])
    ours = sample_teacher(
        backbone,
        backbone.collate(items),
        backbone.collate(empty),
        guidance_scale=guidance_scale,
        times=backbone.teacher_times(6),
        noise=noise,
    )
    theirs = drawn_by(plain, backbone, noise, 6, guidance_scale)
    assert truncated == 1
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - noise).abs().max() > 1e-2


def test_guidance_and_prompt_matter(backbone):
    """Or the equality above would hold of a network that sees neither."""
    noise = noise_for(3, "teacher", shape=(1, *backbone.latent_shape)).expand(2, -1, -1, -1)
    items, empty = backbone.encode(PROMPTS)[0], backbone.collate(backbone.encode([""])[0])
    made = [
        sample_teacher(
            backbone, backbone.collate(items), empty, guidance_scale=scale, times=backbone.teacher_times(2), noise=noise
        )
        for scale in (1.0, 4.0)
    ]
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert (made[0][0] - made[0][1]).abs().max() > 1e-3


def compare_student(backbone, few: FewSteps, **named: list) -> float:
    """The greatest difference of the student's latents from those of its pipeline, as a share of the greatest latent.

    named: what its call needs besides the number of steps.
    """
    exported = backbone.build_student_pipeline(backbone.network, few)
    exported.set_progress_bar_config(disable=True)
    start = noise_for(4, "start", shape=(2, *backbone.latent_shape))
    torch.manual_seed(11)
    theirs = drawn_by(exported, backbone, start, few.steps, 1.0, **named)
    torch.manual_seed(11)  # the pipeline draws the renoising noise, in its own layout, from torch's global generator
    packed = backbone.to_pipeline(start)
    noises = [start, *(backbone.from_pipeline(torch.randn_like(packed)) for _ in range(few.steps - 1))]
    c, times = backbone.collate(backbone.encode(PROMPTS)[0]), backbone.student_times(few)
    ours = sample_student(backbone, backbone.network, c, times=times, noises=torch.stack(noises), eta=few.drawn_eta)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (2, 0.0), (4, 0.0)])
def test_student_equals_its_exported_pipeline(backbone, steps, eta):
    difference = compare_student(backbone, FewSteps(steps, eta))
    assert difference < 1e-5
    few = FewSteps(steps, 1 - eta)
    c, times = backbone.collate(backbone.encode(PROMPTS)[0]), backbone.student_times(few)
    noises = noise_for(4, "start", shape=(steps, 2, *backbone.latent_shape))
    one, other = (sample_student(backbone, backbone.network, c, times=times, noises=noises, eta=e) for e in (0.0, 1.0))
    assert steps == 1 or (one - other).abs().max() / one.abs().max() > 100 * difference, (
        "nobody could tell the two samplers apart"
    )


@pytest.mark.parametrize(
    ("timesteps", "eta"), [((399,), 1.0), ((850, 401), 0.0), ((850, 401), 1.0), ((999, 700, 650, 20), 0.0)]
)
def test_a_student_of_other_times_equals_its_pipeline(backbone, timesteps, eta):
    few = FewSteps(len(timesteps), eta, timesteps)
    named = {"sigmas": [each / 1000 for each in timesteps]}
    if backbone.family == "sdxl":
        named = {"timesteps": list(timesteps)} if len(timesteps) > 1 else {}
    assert backbone.student_arguments(few) == named
    assert backbone.student_timesteps(few).tolist() == pytest.approx(timesteps)
    assert compare_student(backbone, few, **named) < 1e-5


@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (2, 1.0), (4, 0.0)])
def test_a_student_of_another_shift_equals_its_pipeline(backbone, steps, eta):
    few = FewSteps(steps, eta, shift=5.0)
    if backbone.family == "sdxl":
        with pytest.raises(ConfigError, match="flow models"):
            backbone.check_student(few)
        return
    t = torch.linspace(1, 0, steps + 1)
    assert torch.allclose(backbone.student_times(few), 5 * t / (1 + 4 * t), atol=3e-3)  # SD3: diffusers stretches them
    assert compare_student(backbone, few) < 1e-5


@pytest.mark.parametrize(("steps", "timesteps"), [(1, None), (1, (399,)), (4, None)])
def test_a_1_step_student_whose_errors_are_blown_up_is_told_so(backbone, steps, timesteps):
    few = FewSteps(steps, timesteps=timesteps)
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t = backbone.student_times(few)[:1]
    x0 = [backbone.path.to_x0(noise, noise + error, t) for error in (0.0, 0.001)]
    blown = ((x0[1] - x0[0]).mean().abs() / 0.001).item()
    note = note_one_step(backbone, few)
    assert (note is not None) == (steps == 1 and blown > 5)
    assert (note is not None) == (backbone.family == "sdxl" and steps == 1 and timesteps is None)
    assert note is None or f"by {blown:.1f};" in note


@pytest.mark.parametrize("timesteps", [(399.5,), (1000,), (0.5,)])
def test_an_sdxl_is_told_whole_numbers_of_its_training(backbone, timesteps):
    few = FewSteps(1, timesteps=timesteps)
    if backbone.family == "sdxl":
        with pytest.raises(ConfigError, match="whole numbers from 1 to 999"):
            backbone.check_student(few)
    else:
        backbone.check_student(few)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_student_times_are_the_official_ones(backbone, steps):
    """Flow: the shifted linspace of the official demo. SDXL: DMD2's even timesteps, 999, 749, 499, 249 for four."""
    config = backbone.pipe.scheduler.config
    shift = config.get("shift", 1.0)
    if config.get("use_dynamic_shifting"):  # 16 tokens, on the line through (256, 0.5) and (4096, 1.15)
        shift = math.exp(0.5 - 240 * 0.65 / 3840)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    assert torch.allclose(
        backbone.student_times(FewSteps(steps)).double(), shift * t / (1 + (shift - 1) * t), atol=3e-3
    )


def test_decode_equals_the_pipeline(backbone, plain):
    latents = noise_for(5, "latents", shape=(2, *backbone.latent_shape))
    shift = plain.vae.config.shift_factor or 0.0
    decoded = plain.vae.decode(latents / plain.vae.config.scaling_factor + shift).sample
    expected = plain.image_processor.postprocess(decoded.detach(), output_type="pt")
    assert torch.allclose(backbone.decode(latents), expected, atol=1e-5)
    assert expected.shape == (2, 3, RESOLUTION, RESOLUTION)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_a_window_of_training_moves_student_and_fake_score(backbone, rank):
    """All families run the same update, none has code of its own for it; recomputed activations change no bit."""
    ends, kept = [], []
    for recompute in (False, True):
        base = SharedBase(copy.deepcopy(backbone), fake_rank=2, fake_scale=2.0, student_rank=rank, seed=0)
        if recompute:
            base.recompute_activations("all")
        c, empty = backbone.collate(backbone.encode(PROMPTS)[0]), backbone.collate(backbone.encode([""])[0])
        noises = noise_for(6, "rollout", shape=(2, 2, *backbone.latent_shape))
        states = roll_out(base, c, times=backbone.student_times(FewSteps(2)), noises=noises)
        batches = select_states(states, c, torch.tensor([0, 3]))
        levels = Levels(torch.tensor([0.4, 0.8]), noise_for(7, "renoise", shape=(2, *backbone.latent_shape)))
        roles = (base.student_parameters, base.fake_parameters)
        before = [{name: value.detach().clone() for name, value in role.items()} for role in roles]
        rl = WeightedLoss(lambda x0, _, base=base: (losses.refl(base.backbone.decode(x0).mean(dim=(1, 2, 3))), {}), 0.5)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            student, fake = (Trainable(role, torch.optim.SGD(role.values(), 0.1), clip=1.0) for role in roles)
            real_score = RealScore(empty, guidance_scale=4.0, lora_scale=0.5)
            figures = update_student(base, batches, levels, real_score, student=student, fake_score=fake, rl=rl)
        assert figures["grad_student"] > 0 and figures["grad_fake"] > 0 and figures["loss_dm"] > 0, figures
        for role, old in zip(roles, before, strict=True):
            assert any(not torch.equal(value, old[name]) for name, value in role.items())
        ends.append({name: value.detach() for role in roles for name, value in role.items()})
        kept.append(sum(saved))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert kept[1] < kept[0], kept


def test_a_resolution_that_the_family_does_not_have_is_refused(backbone, plain, tmp_path):
    plain.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="teacher.resolution 17 is not a multiple of .*; the nearest is 16"):
        load_teacher(tmp_path, text=False, resolution=17)


def test_a_teacher_that_predicts_something_else_is_refused(tiny_sdxl_folder, tmp_path):
    scheduler = EulerDiscreteScheduler(prediction_type="sample")
    DiffusionPipeline.from_pretrained(tiny_sdxl_folder, scheduler=scheduler).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="predicts .sample. .*give another teacher"):
        load_teacher(tmp_path)
