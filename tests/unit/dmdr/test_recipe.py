"""The small settings of the recipe: a range of guidance, the unconditional row, low levels, floor, warm-up, DynaDG."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmdr.assembly.checks import check_lora_targets
from dmdr.assembly.networks import build_base
from dmdr.config.few_steps import FewSteps
from dmdr.config.load import load_config
from dmdr.config.training import Dynamic, Optimizer, Training
from dmdr.draws import Run, draw_guidance, draw_levels
from dmdr.dyna import real_scale, renoise_beta
from dmdr.errors import ConfigError
from dmdr.losses import distribution_matching
from dmdr.noise import uniforms_for
from dmdr.optimizers import build_optimizer, learning_rate
from dmdr.path import FlowPath
from dmdr.planning.plan import plan_stage
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.train import training_step
from flows.commands.plan import print_plan
from stages.runtime.prerequisites import check_teacher_settings
from tests.support.few_prompts import FewPrompts
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two squares"]
RATE = Optimizer(learning_rate=1e-3)
TRAINING = Training(updates=9, batch_size=2, fake_updates=1, student=RATE, fake_score=RATE)


def make_run(folder, training: Training = TRAINING, **changes) -> Run:
    backbone = copy_teacher(folder)
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=2, seed=0)
    run = Run(
        stage="cold_start",
        seed=7,
        training=training,
        base=base,
        prompts=FewPrompts(backbone, PROMPTS),
        unconditional=backbone.collate([backbone.encode_unconditional("pipeline")]),
        times=backbone.student_times(FewSteps(2)),
        guidance_scale=3.0,
    )
    return replace(run, **changes)


def test_one_scale_is_drawn_an_update_by_seed_stage_and_update_alone(tiny_sd3_folder):
    run = make_run(tiny_sd3_folder, guidance_scale=(6.5, 7.5))
    drawn = [draw_guidance(run, update) for update in range(400)]
    torch.randn(10)
    assert drawn == [draw_guidance(run, update) for update in range(400)]
    assert min(drawn) >= 6.5 and max(drawn) <= 7.5
    assert torch.tensor(drawn).mean() == pytest.approx(7.0, abs=0.05) and len(set(drawn)) == 400
    assert drawn != [draw_guidance(replace(run, seed=8), update) for update in range(400)]
    assert drawn != [draw_guidance(replace(run, stage="joint"), update) for update in range(400)]
    assert draw_guidance(replace(run, guidance_scale=3.0), 5) == 3.0


def test_an_update_takes_the_scale_that_it_drew(tiny_sd3_folder):
    """A whole training step with a range is the one with the scale drawn from it, bit for bit."""
    ends = []
    for scale in ((2.0, 6.0), None):
        run = make_run(tiny_sd3_folder, guidance_scale=(2.0, 6.0))
        if scale is None:
            run = replace(run, guidance_scale=draw_guidance(run, 3))
        state = TrainState(run.base, run.training, ema=0.0)
        state.update = 3
        ends.append(training_step(run, state))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("family", ["sd3", "sdxl", "z_image"])
def test_the_row_without_a_prompt_is_the_one_asked_for(family, request):
    backbone = copy_teacher(request.getfixturevalue(f"tiny_{family}_folder"))
    own, (empty,) = backbone.encode_unconditional("pipeline"), backbone.encode([""])[0]
    assert all(torch.equal(value, empty[key]) for key, value in own.items())
    encoded = backbone.encode_unconditional("encoded")
    assert all(value.any() for value in encoded.values())
    if family == "sdxl":  # whose pipeline has zeros
        assert not any(value.any() for value in own.values())
        backbone.pipe.register_to_config(force_zeros_for_empty_prompt=False)
        (empty,) = backbone.encode([""])[0]
    assert all(torch.equal(value, empty[key]) for key, value in encoded.items())
    if family == "z_image":
        with pytest.raises(ConfigError, match="unconditional is zeros, but Z-Image .*set encoded"):
            backbone.encode_unconditional("zeros")
        return
    zeros = backbone.encode_unconditional("zeros")
    assert not any(value.any() for value in zeros.values())
    c, row = backbone.collate(backbone.encode(PROMPTS)[0]), backbone.collate([zeros])
    assert all(row[key].shape[2:] == value.shape[2:] for key, value in c.items())


def test_a_teacher_without_a_second_half_refuses_a_row_for_it(tiny_flux_folder):
    backbone = copy_teacher(tiny_flux_folder)
    for kind in ("encoded", "zeros") if backbone.guidance_is_input else ():
        with pytest.raises(ConfigError, match=f"unconditional is {kind}, but this teacher's network takes the guid"):
            backbone.check_unconditional(kind)
    backbone.check_unconditional("pipeline")
    backbone.guidance_is_input = False
    assert not any(value.any() for value in backbone.encode_unconditional("zeros").values())


def test_a_plan_and_the_first_stage_refuse_what_the_teacher_does_not_have(tiny_config, tiny_z_image_folder):
    path = tiny_config(teacher={"path": str(tiny_z_image_folder), "guidance_scale": 3.0, "unconditional": "zeros"})
    with pytest.raises(ConfigError, match="teacher.unconditional is zeros, but Z-Image"):
        plan_stage(load_config(path), "cold_start")
    with pytest.raises(ConfigError, match="teacher.unconditional is zeros, but Z-Image"):
        check_teacher_settings(load_config(path), fetches=False)
    with pytest.raises(ConfigError, match="teacher.unconditional is zeros, but Z-Image"):
        build_base(load_config(path), copy_teacher(tiny_z_image_folder))
    config = load_config(tiny_config(fake_score={"lora_rank": 2, "lora_targets": ["conv1"]}))
    with pytest.raises(ConfigError, match="fake_score.lora_targets has conv1, which is no linear or convolutional"):
        check_lora_targets(config, copy_teacher(tiny_z_image_folder))
    with pytest.raises(ConfigError, match="fake_score.lora_targets has conv1"):
        check_teacher_settings(config, fetches=False)
    with pytest.raises(ConfigError, match="fake_score.lora_targets has conv1"):
        plan_stage(config, "joint")


def test_levels_down_to_0_tell_a_unet_the_timesteps_of_its_training(tiny_sdxl_folder, tiny_sd3_folder):
    """Timesteps 0 to 999, and the noise that belongs to each; a flow has no lowest level."""
    full = Training(updates=9, batch_size=2, student=RATE, fake_score=RATE, renoise_range=(0.0, 1.0))
    run = make_run(tiny_sdxl_folder, full)
    path = run.base.backbone.path
    levels = draw_levels(run, 0, 0, range(10_000)).t
    steps = path.timestep(levels)
    assert int(steps.min()) == 0 and int(steps.max()) == path.timesteps - 1
    assert float((path.signal_and_spread(levels)[1] > 0).float().mean()) == 1.0, "there is noise to predict at each"
    uniform = uniforms_for(7, "cold_start", "levels", 0, 0, rows=range(10_000))
    flow = draw_levels(make_run(tiny_sd3_folder, full), 0, 0, range(10_000)).t
    assert torch.allclose(flow.double(), uniform, atol=1e-6)
    changed = levels != flow
    assert 0 < int(changed.sum()) < 60 and float(flow[changed].max()) < path.lowest
    assert FlowPath.lowest == 0


def test_the_floor_is_added_to_what_divides_the_gradient():
    generator = torch.Generator().manual_seed(3)
    x0, real, fake = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_(True)
    distribution_matching(x0, real, fake, 0.5).backward()
    weight = (x0.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True) + 0.5
    assert torch.allclose(x0.grad, (fake - real) / weight / x0.numel())
    x0.grad = None
    distribution_matching(x0, x0.detach(), fake, 1e-8).backward()  # nothing to divide by: the floor alone
    assert x0.grad.isfinite().all()


def test_a_rate_warms_up_and_then_is_the_one_without_warm_up():
    falling = {"learning_rate": 1e-3, "final_learning_rate": 1e-4}
    warm, plain = Optimizer(**falling, warmup=4), Optimizer(**falling)
    rates = [learning_rate(warm, update, 10) for update in range(10)]
    expected = [learning_rate(plain, update, 10) * min(1.0, (update + 1) / 4) for update in range(10)]
    assert rates == pytest.approx(expected)
    assert learning_rate(Optimizer(learning_rate=1e-3, warmup=1), 0, 10) == 1e-3


@pytest.mark.parametrize("kind", ["adamw", "fused", "8bit"])
def test_eps_reaches_every_kind_of_adam(kind):
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 1e-3)
    optimizer = build_optimizer({"p": parameter}, Optimizer(learning_rate=1.0, weight_decay=0.0, kind=kind, eps=1e-3))
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full((4,), -0.5), rtol=1e-4), "lr g / (|g| + eps)"


def test_dynadg_lasts_a_whole_cold_start():
    """The authors' text-to-image runs: 0.5 falls over all 2,000 updates, and is 0 when joint training begins."""
    dynamic = Dynamic(updates=2000, real_scale=0.5, renoise=(4.0, 1.5))
    assert real_scale(0, dynamic) == 0.5 and real_scale(1000, dynamic) == pytest.approx(0.25)
    assert 0 < real_scale(1999, dynamic) < 1e-6 and real_scale(2000, dynamic) == 0
    assert renoise_beta(2000, dynamic) == (1, 1)


def test_a_plan_needs_no_start_and_says_so(tiny_config, capsys):
    path = tiny_config(student={"steps": 2, "start": {"path": "models/not-here.safetensors"}})
    assert print_plan(str(path), "h100-80") == 0
    said = capsys.readouterr().out
    assert "student.start.path models/not-here.safetensors: no such file" in said and "counts one that fits" in said
