"""ReFL, DPO and GRPO: known answers on closed forms, gradients against independent oracles, what each costs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from dmdr import losses
from dmdr.backbones.protocol import Item
from dmdr.config import rl as config_of
from dmdr.config.batches import count_rl, count_student_forwards
from dmdr.config.few_steps import FewSteps
from dmdr.config.training import Joint, Optimizer
from dmdr.draws import Run, roll_out_prompts, select_batches
from dmdr.errors import ConfigError
from dmdr.noise import noise_for
from dmdr.path import FlowPath, VPPath
from dmdr.rl.actions import Actions, follow_trajectories
from dmdr.rl.dpo import DPO
from dmdr.rl.evolution_strategies import EvolutionStrategies
from dmdr.rl.grpo import GRPO
from dmdr.rl.objective import RLTerm
from dmdr.rl.refl import ReFL
from dmdr.rl.surrogate import Surrogate
from dmdr.rl.weighting import Weighting
from dmdr.rollout import Renoising, prompt_order
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.train import training_step
from dmdr.update import Batch, FigureSums, select_states
from tests.support.few_prompts import FewPrompts
from tests.support.tiny_teachers import copy_teacher

PROMPTS = ["a red circle", "two blue squares", "a green cross", "a yellow triangle above a red circle"]
PATHS = {"flow": FlowPath(), "vp": VPPath(torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0))}
MAKE = {
    "refl": (ReFL, config_of.ReFL, {}),
    "dpo": (DPO, config_of.DPO, {"branches": 0, "batch": 6, "group_size": 3}),
    "grpo": (GRPO, config_of.GRPO, {"branches": 0, "batch": 6, "group_size": 3}),
    "dpo-branches": (DPO, config_of.DPO, {"branches": 3, "states": 3}),
    "grpo-branches": (GRPO, config_of.GRPO, {"branches": 3, "states": 3}),
}
MAKE["surrogate"] = (Surrogate, config_of.Surrogate, {"samples": 8, "steps": 2, "width": 8})
MAKE["es"] = (EvolutionStrategies, config_of.EvolutionStrategies, {"states": 3, "pairs": 2})
WEIGHTINGS = {  # which have no loss
    "weighting": (Weighting, config_of.Weighting, {}),
    "weighting-guidance": (Weighting, config_of.Weighting, {"part": "guidance"}),
}
POLICIES = ["dpo", "grpo", "dpo-branches", "grpo-branches"]
ONE_FAMILY = {  # where the family is of little matter: one for each, and both for DPO and for GRPO
    "refl": "sd3",
    "dpo": "sdxl",
    "grpo": "sd3",
    "dpo-branches": "sd3",
    "grpo-branches": "sdxl",
    "surrogate": "sdxl",
    "es": "sd3",
}


def settings(algorithm: str, **changes):
    _, kind, defaults = (MAKE | WEIGHTINGS)[algorithm]
    named = {"algorithm": algorithm.partition("-")[0], "weight": 1.0, "rewards": {"lab-conv": 1.0}}
    return kind(**{**named, **defaults, **changes})


@pytest.fixture(scope="module")
def sd3_folder(tiny_sd3_without_t5_folder: Path) -> Path:
    return tiny_sd3_without_t5_folder


@pytest.fixture(scope="module")
def sdxl_folder(tiny_sdxl_folder: Path) -> Path:
    return tiny_sdxl_folder


@pytest.fixture(params=["sd3", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@cache
def encode_once(folder: Path) -> tuple[FewPrompts, list[Item]]:
    """PROMPTS and the empty prompt, as a teacher encodes them in float32."""
    backbone = copy_teacher(folder)
    return FewPrompts(backbone, PROMPTS), backbone.encode([""])[0]


@cache
def untrained_base(folder: Path) -> SharedBase:
    """For tests that make an algorithm on it and train nothing."""
    return SharedBase(copy_teacher(folder), fake_rank=2, fake_scale=2.0, student_rank=None, seed=0)


def made(folder, algorithm: str, *, rank: int | None = None, distil: bool = True, **changes) -> tuple[Run, TrainState]:
    """A run of that algorithm on a tiny teacher in float64, and its fresh state."""
    backbone = copy_teacher(folder)
    prompts, empty = encode_once(folder)
    base = SharedBase(backbone, fake_rank=2, fake_scale=2.0, student_rank=rank, seed=0)
    base.keep_reference()
    rl = settings(algorithm, **changes)
    made_of = (MAKE | WEIGHTINGS)[algorithm][0](rl, base)
    for reward in made_of.reward.rewards.values():
        reward.scale, reward.bias = 4.0, 0.0  # as shipped, it is sure that images of an untrained teacher are wrong
    if isinstance(made_of, Surrogate):
        made_of.network.double()
        made_of.average.double()
    networks = (backbone.network, base.student_network, backbone.pipe.vae, *made_of.reward.rewards.values())
    for network in (*networks, *([] if rank else [base.reference_network])):
        network.double()
    optimizer = Optimizer(learning_rate=1e-2)
    training = Joint(
        updates=4,
        batch_size=6,
        fake_updates=3,
        student=optimizer,
        fake_score=optimizer,
        rl=rl,
        distribution_matching=distil,
    )
    run = Run(
        stage="joint",
        seed=0,
        training=training,
        base=base,
        prompts=prompts,
        unconditional=backbone.collate(empty),
        times=backbone.student_times(FewSteps(4)).double(),
        guidance_scale=2.0,
        rl=RLTerm(made_of, rl),
        distribution_matching=distil,
    )
    return run, TrainState(base, training, ema=0.5, beside=made_of.trained)


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_log_probabilities_are_those_of_torch(path, eta):
    generator = torch.Generator().manual_seed(3)
    x_t, x0, x_next = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    t, t_next = torch.tensor([0.6, 0.8, 1.0]).double(), torch.tensor([0.3, 0.7, 0.9]).double()
    actions = Actions(x_next[:, None], t_next, path, eta)
    ours = actions.log_prob(Batch(x_t, x0, t, {}, t, t, slice(0, 3), of=3), x0)[:, 0] * x0[0].numel()
    for index in range(3):
        signal, spread = (float(each[index]) for each in path.signal_and_spread(t_next))
        signal_t, spread_t = (float(each[index]) for each in path.signal_and_spread(t))
        noise = (x_t[index] - signal_t * x0[index]) / spread_t
        mean = signal * x0[index] + spread * math.sqrt(1 - eta**2) * noise
        policy = Independent(Normal(mean, torch.full_like(mean, eta * spread)), 3)
        assert float(ours[index]) == pytest.approx(float(policy.log_prob(x_next[index])), abs=1e-6)


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_slope_of_a_renoising_step_is_its_derivative(path, eta):
    step = Renoising(path, torch.tensor([0.8, 1.0]).double(), torch.tensor([0.3, 0.6]).double(), eta)
    x_t = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x0 = torch.zeros_like(x_t).requires_grad_(True)
    (slope,) = torch.autograd.grad(step.mean(x_t, x0).sum(), x0)
    assert torch.allclose(slope, step.slope().view(-1, 1, 1, 1).expand_as(slope))


def test_gaussian_kl_is_that_of_torch():
    generator = torch.Generator().manual_seed(4)
    x0, reference = (torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    signal, spread = torch.tensor([0.4, 0.9]).double(), torch.tensor([0.8, 0.2]).double()
    policies = [Normal(signal.view(-1, 1, 1, 1) * each, spread.view(-1, 1, 1, 1)) for each in (x0, reference)]
    assert float(losses.gaussian_kl(x0, reference, signal / spread)) == pytest.approx(
        float(kl_divergence(*policies).mean())
    )


def test_advantages_are_standard_scores_and_exactly_zero_in_a_tie():
    found = losses.advantages(torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]]))
    assert found[0].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], rel=1e-3)
    assert found[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [(1, 2, -2, -2), (1.5, 2, -2.2, 0), (1.5, -2, 3, 3), (0.5, -2, 1.8, 0), (0.5, 2, -1, -1)],
)
def test_the_clipped_ratio_by_hand(ratio, advantage, loss, slope):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    found = losses.grpo(log_ratio, torch.tensor([float(advantage)]), 0.1)
    found.backward()
    assert float(found) == pytest.approx(loss) and float(log_ratio.grad) == pytest.approx(slope)


def test_grpo_ascends_the_reward_of_a_gaussian_policy():
    """Reward -x^2 under N(mu, 1): the gradient of the surrogate, on average, is that of E[x^2] = mu^2 + 1."""
    generator = torch.Generator().manual_seed(5)
    mu = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x = 0.8 + torch.randn(4000, 50, generator=generator, dtype=torch.float64)
    rewards_PG = -(x**2)
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)  # without the division, which changes the length alone
    log_ratio = Normal(mu, 1.0).log_prob(x) - Normal(mu.detach(), 1.0).log_prob(x)
    losses.grpo(log_ratio.flatten(), centred.flatten(), 0.2).backward()
    assert float(mu.grad) == pytest.approx(2 * 0.8 * 49 / 50, abs=0.02)  # a group's own mean takes 1 / G away


def test_preferences_of_two_images():
    """At the reference the loss is log 2 and the slope beta / 2; swapping winner and loser flips its sign."""
    for gains, sign in (((0, 1), 1.0), ((1, 0), -1.0)):
        gain = torch.zeros(2, requires_grad=True)
        loss = losses.dpo(gain[gains[0]][None], gain[gains[1]][None], 3.0, torch.tensor([True]))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(math.log(2))
        assert gain.grad.tolist() == pytest.approx([-1.5 * sign, 1.5 * sign])
    sure = losses.dpo(torch.tensor([2.0]), torch.tensor([-1.0]), 3.0, torch.tensor([True]))
    assert float(sure) == pytest.approx(math.log1p(math.exp(-9.0)))
    assert float(losses.dpo(torch.tensor([2.0]), torch.tensor([-1.0]), 3.0, torch.tensor([False]))) == 0


def prepared(run: Run, *, moved: float = 0.0):
    """(x0 as a leaf, batch, objective) of one update, x0 moved away from the rollout's by noise."""
    window, window_rl = roll_out_prompts(run, 0)
    objective = run.rl.algorithm.build_objective(window_rl)
    ((batch,), *_) = objective.batches or select_batches(run, window).student
    noise = noise_for(9, "moved", shape=tuple(batch.x0.shape)).double()
    return (batch.x0 + moved * noise).requires_grad_(True), batch, objective, window_rl


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_policy_gradient_is_the_weighted_score_function(folder, algorithm):
    """d log pi / d x0 = signal (x_next - signal x0) / spread^2, weighted by advantage or by the sigmoid."""
    run, _ = made(folder, algorithm, **({"beta": 5.0} if algorithm == "dpo" else {}))
    x0, batch, objective, window = prepared(run)
    states = window.states
    loss, _ = objective.loss(x0, batch)
    loss.backward()
    images = run.base.backbone.decode(states.x0[-1])
    (reward,) = run.rl.algorithm.reward.rewards.values()
    texts = [record["prompt"] for record in window.records]
    assert len(images) == 6 and set(texts[:3]) != set(texts[3:])
    r = reward(images, texts)
    groups = r.view(-1, 3)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)).flatten()
    assert len(x0) == {"grpo": 3 * 6, "dpo": 3 * 4}[algorithm] and int(batch.step.max()) == 2, "every action, no more"
    for row in range(len(x0)):
        step, trajectory = int(batch.step[row]), int(batch.trajectory[row])
        signal, spread = (float(v) for v in run.base.backbone.path.signal_and_spread(states.times[step + 1]))
        score = signal * (states.x_t[step + 1, trajectory] - signal * batch.x0[row]) / spread**2 / x0[0].numel()
        if algorithm == "grpo":
            expected = -advantage[trajectory] * score / len(x0)
        else:
            best = groups[trajectory // 3].argmax() == trajectory % 3
            expected = (-1 if best else 1) * 2.5 * score / (len(x0) / 2)
        assert torch.allclose(x0.grad[row], expected, rtol=1e-4, atol=1e-12)


class Constant(torch.nn.Module):
    """A reward of one number for every image."""

    name, differentiable = "constant", True

    def __init__(self, value: float = 0.7, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.value, self.shape = value, shape

    def forward(self, images, prompts, metadata=()):
        return torch.full(self.shape or (len(images),), self.value)


@pytest.mark.parametrize("algorithm", POLICIES)
def test_equal_rewards_give_exactly_no_gradient(folder, algorithm):
    run, _ = made(folder, algorithm)
    run.rl.algorithm.reward.rewards["lab-conv"] = Constant()
    x0, batch, objective, _ = prepared(run)
    objective.loss(x0, batch)[0].backward()
    assert x0.grad.abs().max() == 0


@pytest.mark.parametrize("algorithm", ["dpo", "dpo-branches"])
def test_swapping_winner_and_loser_flips_the_gradient(folder, algorithm):
    run, _ = made(folder, algorithm, **({"group_size": 2} if algorithm == "dpo" else {"branches": 2}))
    found = []
    for share in (1.0, -1.0):
        run.rl.algorithm.reward.shares["lab-conv"] = share
        x0, batch, objective, window = prepared(run)
        found.append(torch.zeros_like(window.states.x_t))
        objective.loss(x0, batch)[0].backward()
        found[-1][batch.step, batch.trajectory] = x0.grad
    assert found[0].abs().max() > 0 and torch.allclose(found[0], -found[1], rtol=1e-9)


@pytest.mark.parametrize("phi", ["linear", "log"])
def test_refl_gradient_equals_finite_differences(folder, phi):
    run, _ = made(folder, "refl", rewards={"lab-conv": 1.0, "lab-mixer": 0.5}, pretraining=0.3, map=phi)
    x0, batch, objective, _ = prepared(run, moved=0.1)
    objective.loss(x0, batch)[0].backward()
    direction = noise_for(6, "direction", shape=tuple(x0.shape)).double()
    h = 1e-6
    with torch.no_grad():
        up, down = (objective.loss(x0 + sign * h * direction, batch)[0] for sign in (1, -1))
    slope = float((x0.grad * direction).sum())
    assert abs(slope) > 1e-4 and slope == pytest.approx(float((up - down) / (2 * h)), rel=1e-4)


@pytest.mark.parametrize(("phi", "mapped"), [("linear", lambda r: r), ("log", torch.log)])
def test_refl_loss_is_minus_the_mean_mapped_reward(folder, phi, mapped):
    run, _ = made(folder, "refl", rewards={"lab-conv": 1.0, "lab-mixer": 0.5}, map=phi)
    x0, batch, objective, _ = prepared(run)
    loss, figures = objective.loss(x0, batch)
    order = prompt_order(0, "joint", 0, 4, len(PROMPTS))
    texts = [PROMPTS[order[i]] for i in batch.trajectory]
    by_hand = {
        name: reward(run.base.backbone.decode(x0), texts) for name, reward in run.rl.algorithm.reward.rewards.items()
    }
    assert float(loss) == pytest.approx(-float(mapped(by_hand["lab-conv"] + 0.5 * by_hand["lab-mixer"]).mean()))
    sums = FigureSums()
    sums.add(figures)
    figures = sums.of_all_ranks()
    for name, scores in by_hand.items():
        assert float(figures[f"reward/{name}"]) == pytest.approx(float(scores.mean()))
        assert float(figures[f"reward_std/{name}"]) == pytest.approx(float(scores.std(correction=0)))


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_the_reference_stays_while_the_student_moves(folder, rank):
    run, state = made(folder, "dpo", rank=rank)
    base = run.base
    x_t = noise_for(1, "x", shape=(2, *base.backbone.latent_shape)).double()
    t, c = torch.tensor([0.9, 0.5]).double(), base.backbone.collate(run.prompts.items([0, 1]))
    before = base.reference(x_t, t, c)
    assert torch.allclose(base.student(x_t, t, c), before, atol=1e-12)
    training_step(run, state)
    assert torch.equal(base.reference(x_t, t, c), before)
    assert not torch.allclose(base.student(x_t, t, c), before, atol=1e-3)


@pytest.mark.parametrize(("algorithm", "family"), ONE_FAMILY.items())
def test_rl_alone_runs_no_score_and_leaves_the_fake_score(request, algorithm, family):
    run, state = made(request.getfixturevalue(f"{family}_folder"), algorithm, distil=False)
    fake = {name: p.detach().clone() for name, p in run.base.fake_parameters.items()}
    student = {name: p.detach().clone() for name, p in run.base.student_parameters.items()}
    figures = training_step(run, state)
    assert all(torch.equal(fake[name], p) for name, p in run.base.fake_parameters.items())
    assert any(not torch.equal(student[name], p) for name, p in run.base.student_parameters.items())
    assert "loss_dm" not in figures and "loss_fake" not in figures and math.isfinite(figures["loss_rl"])


@pytest.mark.parametrize("algorithm", [None, *MAKE, *WEIGHTINGS])
def test_an_update_costs_the_forwards_that_are_counted(sd3_folder, algorithm):
    """Samples through a network: 12 of the rollout (3 trajectories), 2 batches of 6 and the student's for the fake
    score, the student's 6, 12 of real (CFG); and what RL samples and trains beside them, DPO by its reference too."""
    run, state = made(sd3_folder, algorithm or "refl")
    run = run if algorithm else replace(run, rl=None)
    calls = []
    networks = {run.base.backbone.network, run.base.student_network, run.base.reference_network}
    hooks = [each.register_forward_hook(lambda *call: calls.append(len(call[2].sample))) for each in networks]
    training_step(run, state)
    for hook in hooks:
        hook.remove()
    config = run.rl.config if run.rl else None
    trained = count_rl(config, 4).states * (2 if isinstance(config, config_of.DPO) else 1)
    assert sum(calls) == 12 + 3 * 6 + 6 + 12 + count_student_forwards(config, 4) + trained
    expected = {"grpo": 6 * 4, "dpo": 6 * 4, "grpo-branches": 3 * 3 * 2, "dpo-branches": 3 * 3 * 2}
    assert count_student_forwards(config, 4) == expected.get(algorithm, 0)


@pytest.mark.parametrize(("family", "rank"), [("sd3", None), ("sdxl", 4)], ids=["sd3-full", "sdxl-lora"])
def test_distillation_is_the_same_bits_beside_any_algorithm_of_weight_0(request, family, rank):
    """Student, EMA, fake score and both optimizers after an update, and the losses, with RL and without it."""
    folder = request.getfixturevalue(f"{family}_folder")
    run, alone = made(folder, "refl", rank=rank, weight=0.0)
    advance(replace(run, rl=None), alone, 1)
    expected = alone.tensors()
    for algorithm in MAKE | WEIGHTINGS:
        how = "matched" if algorithm in ("refl", "grpo-branches") else "fixed"
        run, state = made(folder, algorithm, rank=rank, weight=0.0, weight_is=how)
        advance(run, state, 1)
        found = {name: value for name, value in state.tensors().items() if not name.startswith("surrogate/")}
        assert found.keys() == expected.keys(), algorithm
        assert all(torch.equal(found[name], expected[name]) for name in found), algorithm
        for name in ("loss_dm", "loss_fake", "grad_fake", "renoise_mean"):
            assert [row[name] for row in state.rows] == [row[name] for row in alone.rows], (algorithm, name)
        assert all(row["reward_std/lab-conv"] > 0 for row in state.rows), "RL ran"


@pytest.mark.parametrize("algorithm", ["refl", *POLICIES])
def test_a_matched_weight_makes_the_two_gradients_equally_long(sd3_folder, algorithm):
    """By the median of the first two updates; both gradients are clipped apart, at 1 and at half the median length."""
    run, state = made(sd3_folder, algorithm, weight=0.5, weight_is="matched", matching=2)
    advance(run, state, 3)
    ratios = [min(row["grad_dm"], 1.0) / row["grad_rl"] for row in state.rows]
    medians = [ratios[0], *[median(ratios[:2])] * 2]
    assert [row["rl_weight"] for row in state.rows] == pytest.approx([0.5 * each for each in medians])
    for number, row in enumerate(state.rows):
        length = median(min(each["grad_dm"], 1.0) for each in state.rows[: number + 1][-2:])
        assert row["rl_clipped"] == float(row["rl_weight"] * row["grad_rl"] > 0.5 * length * (1 + 1e-9))
    assert state.info()["rl_ratios"] == pytest.approx(ratios[:2]), "a resumed run must not match again"


@pytest.mark.parametrize(("algorithm", "family"), ONE_FAMILY.items())
def test_a_resumed_run_ends_with_the_same_bits(request, algorithm, family):
    """Two updates, or the second of them by a new process's state: student, EMA, fake score and weight."""
    folder = request.getfixturevalue(f"{family}_folder")
    how = {"weight_is": "matched", "matching": 2}
    how |= {"inner_updates": 2, "clip_range": 1e-3} if "grpo" in algorithm else {}
    run, whole = made(folder, algorithm, **how)
    advance(run, whole, 1)
    saved = {name: value.detach().clone() for name, value in whole.tensors().items()}, whole.info()
    advance(run, whole, 1)
    second, resumed = made(folder, algorithm, **how)
    resumed.restore(*saved)
    advance(second, resumed, 1)
    assert resumed.info() == whole.info()
    found, expected = resumed.tensors(), whole.tensors()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# a LoRA student with ReFL's gradient, and with DPO's reference, which is another of its adapters
@pytest.mark.parametrize(("algorithm", "rank"), [*((name, None) for name in (*MAKE, None)), ("refl", 4), ("dpo", 4)])
def test_parts_of_a_batch_add_up_to_the_batch(request, algorithm, rank):
    """Two updates, the first of which matches the weight, in parts of at most 2 of 6 samples; all in float64.

    Before its first step a student prefers nothing: DPO's figure of that is the sign of zero, which attention without
    a mask leaves exact, whatever the parts. So DPO's teacher has T5.
    """
    folder = request.getfixturevalue("tiny_sd3_folder" if "dpo" in str(algorithm) else "sd3_folder")
    ends, rows = [], []
    for most in (None, 2):
        run, state = made(folder, algorithm or "refl", rank=rank, weight_is="matched")
        run = replace(run, micro_batch=most, **({} if algorithm else {"rl": None}))
        largest = []
        network = run.base.student_network
        hook = network.register_forward_hook(lambda *call, largest=largest: largest.append(len(call[2].sample)))
        advance(run, state, 2)
        hook.remove()
        assert max(largest) <= 2 * 2 if most else max(largest) > 4, "with CFG, two for each"
        ends.append({name: value.detach().double() for name, value in state.tensors().items()})
        rows.append(state.rows)
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-6, atol=1e-7, msg=name)  # AdamW divides
    for whole, parts in zip(*rows, strict=True):
        assert parts == pytest.approx(whole, rel=1e-5, abs=1e-9)


def advance(run: Run, state: TrainState, updates: int) -> None:
    for _ in range(updates):
        state.advance(training_step(run, state))


def test_the_ratio_moves_and_clips_in_inner_updates(sd3_folder):
    run, state = made(sd3_folder, "grpo", inner_updates=2, clip_range=1e-6)
    assert training_step(run, state)["clipped"] > 0
    once, state = made(sd3_folder, "grpo")
    assert training_step(once, state)["clipped"] == 0


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_groups_share_a_prompt_and_pairs_a_step(sd3_folder, algorithm):
    run, _ = made(sd3_folder, algorithm)
    window, own = roll_out_prompts(run, 0)
    objective = run.rl.algorithm.build_objective(own)
    texts = [record["prompt"] for record in own.records]
    assert len(texts) == 6 and len(set(texts[:3])) == len(set(texts[3:])) == 1
    assert len({own.states.x_t[0, i].sum().item() for i in range(len(texts))}) == len(texts), "each its own noise"
    batches = select_batches(run, window)
    assert [[len(part.t) for part in batch] for batch in (*batches.fake_score, *batches.student)] == [[6], [6], [6]]
    if algorithm == "dpo":
        ((batch,),) = objective.batches
        step, group = batch.step.view(-1, 2), batch.trajectory.view(-1, 2) // 3
        assert torch.equal(step[:, 0], step[:, 1]) and torch.equal(group[:, 0], group[:, 1])


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_actions_are_what_the_sampler_drew(sd3_folder, eta):
    run, _ = made(sd3_folder, "grpo")
    run = replace(run, eta=eta)
    _, window = roll_out_prompts(run, 0)
    states = window.states
    pairs = torch.arange(3 * states.x0.shape[1])
    (batch,) = select_states(states, window.c, pairs)
    actions = follow_trajectories(window, run.base.backbone.path, pairs)
    shape = (4, *run.base.backbone.latent_shape)
    drawn = [noise_for(0, "joint rl", "rollout", 0, image, shape=shape) for image in range(states.x0.shape[1])]
    fresh = torch.stack(drawn, dim=1).double()[1:].flatten(0, 1)
    t, t_next = (each.view(-1, 1, 1, 1) for each in (batch.t, actions.t_next))
    old = (batch.x_t - (1 - t) * batch.x0) / t
    noise = eta * fresh + math.sqrt(1 - eta**2) * old
    assert torch.allclose(actions.x_next[:, 0], (1 - t_next) * batch.x0 + t_next * noise)


def broken(monkeypatch, reward) -> None:
    monkeypatch.setattr("dmdr.rl.mixture.load_any_reward", lambda name, device, addresses: reward)


@pytest.mark.parametrize(
    ("reward", "message"),
    [(Constant(float("nan")), "broken gives .*nan"), (Constant(shape=(2, 1)), r"broken gives \(2, 1\) for 3 images")],
    ids=["nan", "shape"],
)
@pytest.mark.parametrize("algorithm", MAKE)
def test_a_broken_reward_is_refused_before_the_first_step(sd3_folder, monkeypatch, reward, message, algorithm):
    broken(monkeypatch, reward)
    base = untrained_base(sd3_folder)
    with pytest.raises(ConfigError, match=message):
        MAKE[algorithm][0](settings(algorithm, rewards={"broken": 1.0}), base)


def test_refl_refuses_a_reward_without_gradient_and_the_others_take_it(sd3_folder, monkeypatch):
    reward = Constant()
    reward.differentiable = False
    broken(monkeypatch, reward)
    base = untrained_base(sd3_folder)
    with pytest.raises(ConfigError, match="flat has none; use another reward, or algorithm: es, grpo or dpo"):
        ReFL(settings("refl", rewards={"flat": 1.0}), base)
    GRPO(settings("grpo", rewards={"flat": 1.0}), base)


@pytest.mark.parametrize(("value", "share"), [(-0.2, 1.0), (0.0, 1.0), (0.7, -1.0)])
def test_refl_refuses_the_log_of_what_is_not_above_0(sd3_folder, monkeypatch, value, share):
    broken(monkeypatch, Constant(value))
    base = untrained_base(sd3_folder)
    with pytest.raises(ConfigError, match="^rl.map: log needs rewards and shares above 0"):
        ReFL(settings("refl", rewards={"constant": share}, map="log"), base)
    ReFL(settings("refl", rewards={"constant": share}), base)


def test_prompts_come_once_an_epoch_whatever_the_window():
    whole = prompt_order(5, "joint", 0, 70, 23)
    assert sorted(whole[:23]) == sorted(whole[23:46]) == list(range(23)) and whole[:23] != whole[23:46]
    pieces = [index for start in range(0, 70, 7) for index in prompt_order(5, "joint", start, 7, 23)]
    assert pieces == whole
    assert prompt_order(5, "cold_start", 0, 23, 23) != whole[:23]
