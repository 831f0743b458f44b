"""Distribution matching weighted by rewards, beside gradients and scores that are worked out otherwise."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmdr import losses
from dmdr.assembly.networks import build_base
from dmdr.config.rl import Weighting as WeightingConfig
from dmdr.draws import roll_out_prompts, select_batches
from dmdr.errors import ConfigError
from dmdr.noise import noise_for
from dmdr.rl.weighting import Weighting
from dmdr.rollout import States, Window, predict_guided
from dmdr.update import Batch, RealScore, SampleWeights
from stages.runtime.prerequisites import check_teacher_settings
from tests.support.ranked_updates import make_run
from tests.support.tiny_teachers import copy_teacher
from tests.unit.dmdr.test_decoupled import load_changed

SHAPE, COUNT = (2, 3, 3), 6


def test_weights_are_exponentials_of_standard_scores_with_mean_1():
    rewards = np.array([0.2, 0.9, 0.4, 0.4, 0.7])
    scores = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    for strength in (0.3, 1.0, -0.5):
        expected = np.exp(strength * scores) / np.exp(strength * scores).mean()
        found = losses.weigh_by_advantage(torch.tensor(rewards), strength)
        assert found.tolist() == pytest.approx(expected.tolist()) and float(found.mean()) == pytest.approx(1)
    assert losses.weigh_by_advantage(torch.tensor(rewards), 0.0).tolist() == [1.0] * 5
    assert losses.weigh_by_advantage(torch.full((5,), 0.1), 3.0).tolist() == [1.0] * 5, "all rewards are equal"


def test_a_weight_multiplies_the_gradient_of_its_sample():
    x0, real, fake = (noise_for(1, name, shape=(COUNT, *SHAPE)).double() for name in ("x0", "real", "fake"))
    weights = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]).double()

    def find_gradient(weights_B: torch.Tensor | None) -> torch.Tensor:
        leaf = x0.clone().requires_grad_(True)
        losses.distribution_matching(leaf, real, fake, 0.1, weights_B).backward()
        return leaf.grad

    plain = find_gradient(None)
    assert torch.allclose(find_gradient(weights), weights.view(-1, 1, 1, 1) * plain)
    assert torch.equal(find_gradient(torch.ones(COUNT).double()), plain)


@pytest.mark.parametrize("scale", [3.0, 7.3])
def test_a_weight_of_the_guidance_multiplies_what_cfg_adds(scale):
    """The network predicts a number for each prompt, which tells with it from without it."""
    x_t, t = noise_for(2, "x", shape=(3, *SHAPE)), torch.full((3,), 0.5)
    c, empty = {"number": torch.tensor([1.0, 2.0, 4.0])}, {"number": torch.tensor([0.5])}
    backbone = SimpleNamespace(
        guidance_is_input=False,
        predict=lambda network, x, t, c: x * c["number"].view(-1, 1, 1, 1),
    )
    weights = torch.tensor([0.0, 1.0, 2.5])
    real_score = RealScore(empty, scale, 0.0).weigh_guidance(weights, x_t)
    found = predict_guided(backbone, None, x_t, t, c, empty, real_score.guidance_scale)
    with_prompt, without = (x_t * each.view(-1, 1, 1, 1) for each in (c["number"], empty["number"]))
    expected = with_prompt + (scale - 1) * weights.view(-1, 1, 1, 1) * (with_prompt - without)
    assert torch.allclose(found, expected, rtol=1e-5)
    plain = predict_guided(backbone, None, x_t, t, c, empty, scale)
    whole = RealScore(empty, scale, 0.0).weigh_guidance(torch.ones(3), x_t).guidance_scale
    assert torch.equal(predict_guided(backbone, None, x_t, t, c, empty, whole), plain), "1 changes no bit"


class World:
    """What a weighting asks of a shared base: latents are images."""

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(
            latent_shape=SHAPE, network=SimpleNamespace(device=torch.device("cpu")), decode=lambda x0: x0
        )


class Sum:
    """A reward without a gradient."""

    name, differentiable = "sum", False

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata=()) -> torch.Tensor:
        return images.double().sum((1, 2, 3))


def make_weighting(**settings: object) -> Weighting:
    config = {"algorithm": "weighting", "weight": 1.0, "rewards": {"lab-checker": 1.0}, **settings}
    made = Weighting(WeightingConfig.model_validate(config), World())
    made.reward.rewards["lab-checker"] = Sum()
    return made


def make_window(update: int = 0) -> Window:
    x0 = noise_for(3, "x0", update, shape=(4, COUNT, *SHAPE)).double()
    states = States(torch.linspace(1, 0.25, 4), x0, x0)
    records = [{"prompt": f"prompt {number}"} for number in range(COUNT)]
    return Window(states, {"c": torch.zeros(COUNT)}, records, torch.linspace(1, 0, 5), 1.0, 0, "joint", update)


def make_batch(window: Window, step: list[int], trajectory: list[int]) -> Batch:
    steps, places = torch.tensor(step), torch.tensor(trajectory)
    x0 = window.states.x0[steps, places]
    return Batch(x0, x0, window.states.times[steps], {}, steps, places, slice(0, len(x0)), len(x0))


def test_a_state_is_weighed_by_the_image_that_its_trajectory_ends_in():
    window, trajectory = make_window(), [5, 0, 3, 1]
    batch = make_batch(window, [0, 3, 1, 2], trajectory)
    weigh = make_weighting().build_objective(window).weigh
    found, figures = weigh([batch], range(4), 0.8)
    rewards = window.states.x0[-1].sum((1, 2, 3))[trajectory]
    assert torch.allclose(found.values, losses.weigh_by_advantage(rewards, 0.8))
    assert found.part == "all" and float(figures["rl_weight"]) == pytest.approx(0.8)
    assert float(figures["rl_weight_std"]) == pytest.approx(float(found.values.std(correction=0)))
    assert float(figures["reward/lab-checker"]) == pytest.approx(float(rewards.mean()))
    one_by_one = [make_batch(window, [0], [place]) for place in trajectory]
    parts = [replace(each, rows=slice(row, row + 1), of=4) for row, each in enumerate(one_by_one)]
    assert torch.equal(weigh(parts, range(4), 0.8)[0].values, found.values), "in parts"


def test_a_control_has_the_weights_of_other_samples():
    """The same numbers, in an order that the update draws."""
    seen = set()
    for update in range(8):
        window = make_window(update)
        batch = make_batch(window, [0] * COUNT, list(range(COUNT)))
        plain, _ = make_weighting().weigh(window, [batch], range(COUNT), 1.0)
        dealt, _ = make_weighting(shuffled=True).weigh(window, [batch], range(COUNT), 1.0)
        assert torch.allclose(plain.values.sort().values, dealt.values.sort().values)
        seen.add(tuple(plain.values.argsort().argsort().tolist()) == tuple(dealt.values.argsort().argsort().tolist()))
    assert False in seen


@pytest.mark.parametrize("part", ["all", "guidance"])
def test_samples_choose_by_what_is_multiplied(part):
    batch = make_batch(make_window(), [0, 1], [2, 3])
    weights = SampleWeights(torch.tensor([2.0, 3.0]), part)
    other = "guidance" if part == "all" else "all"
    assert weights.select(batch, part).tolist() == [2.0, 3.0] and weights.select(batch, other) is None


def test_the_batch_of_the_student_is_what_is_scored(tiny_sd3_folder):
    """One image for each of its samples, however many trajectories there are."""
    run, _ = make_run(tiny_sd3_folder, "weighting, in parts")
    window, _ = roll_out_prompts(run, 0)
    batches = select_batches(run, window)
    (parts,) = batches.student
    scored: list[int] = []
    (name,) = run.rl.algorithm.reward.rewards
    inner = run.rl.algorithm.reward.rewards[name]

    class Counted:
        differentiable = False

        def __call__(self, images, prompts, metadata=()):
            scored.append(len(images))
            return inner(images, prompts)

    run.rl.algorithm.reward.rewards[name] = Counted()
    weights, _ = run.rl.algorithm.build_objective(window).weigh(parts, batches.rows[-1], 1.0)
    assert sum(scored) == run.training.batch_size == len(weights.values) and max(scored) <= run.micro_batch
    assert float(weights.values.mean()) == pytest.approx(1)


def test_a_teacher_without_cfg_has_none_to_weigh(tiny_config, tiny_flux_folder):
    rl = {"algorithm": "weighting", "part": "guidance", "weight": 1.0, "rewards": {"lab-conv": 1.0}}
    config = load_changed(tiny_config(), teacher__path=str(tiny_flux_folder), joint__rl=rl)
    with pytest.raises(ConfigError, match="joint.rl.part is guidance, but this teacher's network takes the guidance"):
        build_base(config, copy_teacher(tiny_flux_folder))
    with pytest.raises(ConfigError, match="set part: all"):
        check_teacher_settings(config, fetches=False)
