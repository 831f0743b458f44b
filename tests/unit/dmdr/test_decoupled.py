"""Decoupled renoise levels: matching and CFG each at its own (Decoupled-DMD, equation 8)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmdr.assembly.networks import build_base
from dmdr.config.changes import apply_changes
from dmdr.config.few_steps import FewSteps
from dmdr.config.identity import identity
from dmdr.config.load import read_mapping, validate
from dmdr.config.run import Config
from dmdr.draws import draw_guidance_levels, draw_levels
from dmdr.errors import ConfigError
from dmdr.losses import decouple_real_score
from dmdr.noise import noise_for
from dmdr.optimizers import Trainable
from dmdr.planning.bench import build_meta_case, count_decoupled
from dmdr.planning.plan import plan_stage
from dmdr.rollout import States
from dmdr.state import TrainState
from dmdr.train import training_step
from dmdr.update import GuidanceLevels, Levels, RealScore, roll_out, select_states, update_student
from stages.runtime.prerequisites import check_teacher_settings
from tests.support import naive
from tests.support.tiny_teachers import copy_teacher
from tests.unit.dmdr.test_recipe import TRAINING, make_run
from tests.unit.dmdr.test_update import PROMPTS, Still, assert_close, gradients, shared_base

SHARES = torch.tensor([0.1, 0.4, 0.8, 0.6], dtype=torch.float64)


def test_at_one_level_it_is_plain_guidance(tiny_sd3_folder):
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    with_prompt, without = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = 1 + 9 * float(torch.rand((), generator=generator))
    ours = decouple_real_score(with_prompt, with_prompt, without, scale)
    assert torch.allclose(ours, without + scale * (with_prompt - without), rtol=0, atol=1e-12)
    base = shared_base(tiny_sd3_folder, None)
    backbone = base.backbone
    c, empty = (backbone.collate(backbone.encode(texts)[0]) for texts in (PROMPTS, [""]))
    at = (noise_for(seed, "x", shape=(4, *backbone.latent_shape)).double(), SHARES)
    coupled = base.real_x0(*at, c, empty, guidance_scale=scale, lora_scale=0.5)
    decoupled = base.decoupled_real_x0(at, at, c, empty, guidance_scale=scale, lora_scale=0.5)
    assert float((coupled - decoupled).abs().max()) < 1e-9 * float(coupled.abs().max())


def load_changed(path, **changes) -> Config:
    """The config at a path with some keys changed; __ in a keyword stands for the dot."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return validate(apply_changes(read_mapping(path, "config", ""), named, "--set"), Config, "config")


def naive_loss(base, states: list, levels: Levels, cfg: GuidanceLevels, unconditional) -> torch.Tensor:
    """Equation 8, one state at a time: (s_r^c - s_f^c)(x_DM) + (g - 1)(s_r^c - s_r^u)(x_CA), as x0 predictions."""
    total, g, scale = 0.0, 3.0, 0.6
    for index, (x, t, c) in enumerate(states):
        x0 = base.student(x, t, c)
        with torch.no_grad():
            level, noise = levels.t[index : index + 1], levels.noise[index : index + 1]
            top = min(t.item(), cfg.span[1]) if cfg.below else cfg.span[1]
            bottom = min(cfg.span[0], top)
            apart = (bottom + cfg.share[index] * (top - bottom)).reshape(1)
            x_DM = naive.mixed(base, x0, noise, level.item())
            x_CA = naive.mixed(base, x0, cfg.noise[index : index + 1], apart.item())
            real_DM = naive.fake_x0(base, x_DM, level, c, scale)
            fake_DM = naive.fake_x0(base, x_DM, level, c, base.fake_scale)
            with_prompt = naive.fake_x0(base, x_CA, apart, c, scale)
            without = naive.fake_x0(base, x_CA, apart, unconditional, scale)
            guided = (g - 1) * (with_prompt - without)
            grad = -((real_DM - fake_DM) + guided) / (x0 - real_DM - guided).abs().mean()
        total = total + (grad * x0).mean() / len(states)
    return total


@pytest.mark.parametrize(("family", "below", "most"), [("sd3", True, None), ("sdxl", True, 3), ("sdxl", False, None)])
def test_gradients_equal_a_naive_oracle(family, below, most, request):
    """In float64, of one batch and of one that is run in two parts; a state below the span is its own level."""
    base = shared_base(request.getfixturevalue(f"tiny_{family}_folder"), None)
    backbone, steps, count = base.backbone, 4, 3
    c, unconditional = (backbone.collate(backbone.encode(texts)[0]) for texts in (PROMPTS[:count], [""]))
    times = backbone.student_times(FewSteps(steps)).double()
    noises = noise_for(7, "rollout", shape=(steps, count, *backbone.latent_shape)).double()
    pairs, noise = torch.tensor([0, 5, 7, 11]), noise_for(8, "renoise", shape=(2, 4, *backbone.latent_shape)).double()
    span = (0.3, 0.98)  # SDXL's last step is below it
    cfg = GuidanceLevels(SHARES, noise[1], span, below)
    levels = Levels(torch.tensor([0.2, 0.5, 0.7, 0.95]).double(), noise[0], cfg)
    batches = select_states(roll_out(base, c, times=times, noises=noises), c, pairs, most=most)
    student = Trainable(base.student_parameters, Still(base.student_parameters.values()), clip=1e9)
    fake_score = Trainable(base.fake_parameters, Still(base.fake_parameters.values()), clip=1e9)
    real_score = RealScore(unconditional, guidance_scale=3.0, lora_scale=0.6)
    update_student(base, batches, levels, real_score, student=student, fake_score=fake_score)
    ours = gradients(base.student_parameters)
    states = [naive.simulate(base, c, times, noises, int(pair), 1) for pair in pairs]
    loss = naive_loss(base, states, levels, cfg, unconditional)
    found = torch.autograd.grad(loss, list(base.student_parameters.values()), allow_unused=True)
    theirs = zip(base.student_parameters, found, strict=True)
    assert_close(ours, {name: gradient for name, gradient in theirs if gradient is not None})


def test_levels_below_the_state_and_independent_ones(tiny_sd3_folder):
    run = make_run(tiny_sd3_folder)
    assert draw_guidance_levels(run, 0, 0, range(8)) is None
    states, shape = 4000, run.base.backbone.latent_shape
    t = torch.linspace(0.01, 1.0, states)
    x = torch.zeros(states, *shape)
    row = torch.zeros(states, dtype=torch.int64)
    (batch,) = [*select_states(roll_out_still(t, x), {}, row + torch.arange(states))]
    for form in ("below", "independent"):
        apart = replace(run, training=TRAINING.model_copy(update={"decoupled": form}))
        drawn = draw_guidance_levels(apart, 3, 1, range(states))
        levels, noise = drawn.of(batch)
        assert torch.equal(levels, draw_guidance_levels(apart, 3, 1, range(states)).of(batch)[0]), "by its place alone"
        plain = draw_levels(run, 3, 1, range(states))
        assert torch.equal(plain.t, draw_levels(apart, 3, 1, range(states)).t) and not torch.equal(noise, plain.noise)
        if form == "below":
            assert bool((levels <= t + 1e-6).all()) and float(levels[t > 0.1].min()) >= 0.02
            position = ((levels - 0.02) / (t.clamp(max=0.98) - 0.02))[t > 0.1]
        else:
            position = (levels - 0.02) / 0.96
            assert bool((levels > t).any())
        assert float(position.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(position.std()) == pytest.approx(12**-0.5, abs=0.01), "uniform"


def roll_out_still(t: torch.Tensor, x: torch.Tensor) -> States:
    """A rollout of one trajectory whose steps have these times."""
    return States(t, x[:, None], x[:, None])


@pytest.mark.parametrize("form", ["below", "independent"])
def test_a_run_goes_on_to_the_same_bits(form, tiny_sd3_folder):
    training = TRAINING.model_copy(update={"decoupled": form, "fake_updates": 2})

    def begin():
        run = make_run(tiny_sd3_folder, training)
        return run, TrainState(run.base, training, ema=0.9)

    run, state = begin()
    for _ in range(3):
        state.advance({"update": state.update, **training_step(run, state)})
        if state.update == 2:
            kept = {name: value.clone() for name, value in state.tensors().items()}, {**state.info()}
            kept[1]["rows"] = [*kept[1]["rows"]]
    again, resumed = begin()
    resumed.restore(*kept)
    resumed.advance({"update": resumed.update, **training_step(again, resumed)})
    assert resumed.rows == state.rows
    ends = state.tensors(), resumed.tensors()
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    plain = make_run(tiny_sd3_folder, training.model_copy(update={"decoupled": None}))
    first = training_step(plain, TrainState(plain.base, plain.training, ema=0.9))
    assert first["loss_fake"] == state.rows[0]["loss_fake"], "the fake score is where it was"
    assert first["loss_dm"] != state.rows[0]["loss_dm"]


def test_it_costs_one_forward(tiny_config):
    case = build_meta_case("SD3-Medium", 4, 5, None, depth=1)
    assert count_decoupled(case) == pytest.approx(1.0, abs=0.01)
    path = tiny_config()
    plain, apart = (
        plan_stage(load_changed(path, cold_start__decoupled=form), "cold_start") for form in (None, "below")
    )
    added = (apart.work["student"] - plain.work["student"]) / plain.forward
    assert added == pytest.approx(1.0, abs=0.1), "one with the fake score's LoRA, under DynaDG"


def test_the_default_is_no_part_of_the_identity(tiny_config):
    path = tiny_config()
    plain = load_changed(path)
    apart = load_changed(path, cold_start__decoupled="below", joint__decoupled="independent")
    assert not [key for key in (*identity(plain, "cold_start"), *identity(plain, "joint")) if "decoupled" in key]
    assert identity(apart, "cold_start")["cold_start.decoupled"] == "below"
    assert identity(apart, "joint")["joint.decoupled"] == "independent"


def test_what_cannot_be_taken_apart_is_refused(tiny_config, tiny_flux_folder):
    path = tiny_config()
    with pytest.raises(ConfigError, match="cold_start.decoupled is below but teacher.guidance_scale 1 leaves no CFG"):
        load_changed(path, teacher__guidance_scale=1.0, cold_start__decoupled="below")
    with pytest.raises(ConfigError, match="joint.decoupled is set but joint.distribution_matching is false; drop it"):
        load_changed(path, joint__decoupled="below", joint__distribution_matching=False)
    with pytest.raises(ConfigError, match="joint.decoupled: .*'below' or 'independent'"):
        load_changed(path, joint__decoupled="above")
    config = load_changed(path, teacher__path=str(tiny_flux_folder), joint__decoupled="below")
    with pytest.raises(ConfigError, match="joint.decoupled is below, but this teacher's network takes the guidance"):
        build_base(config, copy_teacher(tiny_flux_folder))
    with pytest.raises(ConfigError, match="joint.decoupled is below"):
        check_teacher_settings(config, fetches=False)
