"""What rings, judged from scratch at every look of random stages; which students are kept; what a recovery halves."""

from __future__ import annotations

import random

import pytest
import torch

from dmdr.config.rl import ReFL
from dmdr.config.training import Optimizer, Training
from dmdr.config.watch import Watch
from dmdr.errors import ConfigError
from dmdr.shared_base import SharedBase
from dmdr.state import Recovery, StateInfo, TrainState
from dmdr.watch.alarms import best_look, find_alarms, list_kept
from dmdr.watch.figures import (
    BLACK,
    DIVERSITY,
    FAKE_LAG,
    FAKE_RISE,
    FIGURES,
    FLAT,
    GRADIENT,
    NON_FINITE,
    REWARD,
    SATURATION,
    SHARPNESS,
    WHITE,
    measure_updates,
)
from dmdr.watch.recovery import Remedy, Saved, blame
from tests.support.tiny_teachers import copy_teacher

WATCH = Watch(reward="held-out", keep_best=2, reward_drop=0.02)
REFL = ReFL(algorithm="refl", weight=2.0, rewards={"lab-conv": 1.0}, start=3)


def draw_stage(rng: random.Random, *, has_teacher: bool, has_reward: bool) -> list[dict[str, float]]:
    """The looks of a stage whose figures jump about their bounds."""
    looks = []
    for n in range(rng.randrange(1, 12)):
        look = {"update": 50 * n, NON_FINITE: rng.choice([0.0, 0.0, 0.0, 0.5, 1.0])}
        if look[NON_FINITE] < 1:
            look |= {SATURATION: rng.uniform(0.3, 0.5), SHARPNESS: rng.uniform(0.15, 0.4)}
            look |= {figure: rng.choice([0.0, 0.0, 0.05, 0.15, 0.3]) for figure in (BLACK, WHITE, FLAT)}
            look |= {REWARD: rng.uniform(0.3, 0.4)} if has_reward else {}
        if look[NON_FINITE] == 0:
            look |= {DIVERSITY: rng.uniform(0.1, 0.2)}
        if n:
            look |= {FAKE_LAG: rng.uniform(0.7, 1.7), FAKE_RISE: rng.uniform(0.5, 9.5)}
            look |= {GRADIENT: rng.choice([1.0, 2.0, 0.06, 0.02])}
        looks.append(look)
    if has_teacher:
        looks[0] |= {"watch/teacher_saturation": 0.35, "watch/teacher_sharpness": 0.33, "watch/teacher_white": 0.05}
        looks[0] |= {"watch/teacher_diversity": 0.17, "watch/teacher_non_finite": 0.0}
        looks[0] |= {"watch/teacher_reward": 0.38} if has_reward else {}
    return looks


def judge(looks: list[dict[str, float]], n: int) -> set[str]:
    """The figures of a look that are out of bounds, from their definitions."""
    look, first, before, watch = looks[n], looks[0], looks[:n], WATCH
    wrong = {NON_FINITE} if look[NON_FINITE] > 0 else set()
    bests = [each[REWARD] for each in before if each[NON_FINITE] == 0 and REWARD in each]
    top = min(max(bests), first.get("watch/teacher_reward", 1.0)) if bests else 0.0
    dip = 3 if "watch/teacher_non_finite" in first else 1
    if REWARD in look and top - look[REWARD] > dip * watch.reward_drop:
        wrong.add(REWARD)
    for figure, drop in {DIVERSITY: 0.3, SHARPNESS: 0.4}.items():
        teacher = first.get(figure.replace("watch/", "watch/teacher_"))
        seen = [each[figure] for each in before if figure in each]
        highest = [min(teacher, max(seen))] if teacher is not None and seen else []
        known = highest if teacher is not None else seen[:1] if figure in first else []
        if figure in look and known and look[figure] < known[0] * (1 - drop):
            wrong.add(figure)
    for figure in (SATURATION, BLACK, WHITE, FLAT):
        bounds = [first[name] for name in (figure, figure.replace("watch/", "watch/teacher_")) if name in first]
        if figure in look and bounds:
            limit = max(bounds) * 1.3 if figure == SATURATION else max(bounds) + 0.1
            wrong |= {figure} if look[figure] > limit else set()
    wrong |= {FAKE_LAG} if look.get(FAKE_LAG, 0) > 1.2 else set()
    gradients = [each[GRADIENT] for each in before if GRADIENT in each]
    wrong |= {FAKE_RISE} if look.get(FAKE_RISE, 0) > 8 else set()
    wrong |= {GRADIENT} if gradients and look[GRADIENT] < 0.05 * gradients[0] else set()
    return wrong


@pytest.mark.parametrize(
    ("has_teacher", "has_reward"),
    [(False, True), (True, True), (True, False)],
    ids=["joint", "cold start with a reward", "cold start"],
)
def test_alarms_of_random_stages_equal_brute_force(has_teacher, has_reward):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, kinds = random.Random(seed), set()
    watch = WATCH if has_reward else Watch(on_alarm="recover", keep_best=2)
    for _ in range(300):
        looks = draw_stage(rng, has_teacher=has_teacher, has_reward=has_reward)
        wrongs = [judge(looks, n) for n in range(len(looks))]
        rung = {
            (figure, look["update"])
            for look, before, now in zip(looks, [set(), *wrongs], wrongs, strict=False)
            for figure in now - before
        }
        alarms = find_alarms(watch, looks)
        assert {(alarm.figure, alarm.update) for alarm in alarms} == rung and len(alarms) == len(rung)
        assert all("\n" not in alarm.line(watch, "joint", has_rl=has_reward) for alarm in alarms)
        kinds |= {figure for figure, _ in rung}
        rewarded = [look for look in looks if look[NON_FINITE] == 0 and REWARD in look]
        assert best_look(looks) == max(rewarded, key=lambda look: (look[REWARD], -look["update"]), default=None)
        healthy = [look for look, wrong in zip(looks, wrongs, strict=True) if not wrong]
        newest = [look["update"] for look in reversed(healthy)][:2]
        best = [look["update"] for look in sorted(healthy, key=lambda look: look.get(REWARD, 0), reverse=True)][:2]
        kept = newest if has_teacher else best
        back = [look["update"] for look in healthy[:1] if look["update"] not in kept]
        recovers = watch.model_copy(update={"on_alarm": "recover"})
        assert list_kept(recovers, looks) == kept + back
        assert list_kept(watch.model_copy(update={"on_alarm": "warn"}), looks) == kept
    assert kinds == set(FIGURES) - (set() if has_reward else {REWARD})


def test_the_figures_of_updates_are_of_those_since_the_last_look():
    rows = [{"update": -1, "loss_fake": 9.0}] + [
        {"update": n, "loss_fake": 2.0 + n, "grad_student": 2.0 * n} for n in range(6)
    ]
    rows[-1]["watch/loss_teacher"] = 4.0
    assert measure_updates(rows, 3) == {FAKE_RISE: 3.0, GRADIENT: 8.0, FAKE_LAG: 1.75}
    assert measure_updates(rows[:1], 3) == {}
    assert measure_updates([{"update": 0, "grad_student": 1.0}], 3) == {GRADIENT: 1.0}, "RL alone has no fake score"


class OneState:
    """A vault that holds one state."""

    def __init__(self, state: TrainState) -> None:
        tensors = {name: value.clone() for name, value in state.tensors().items()}
        info: StateInfo = {**state.info(), "rows": list(state.rows)}
        self.saved, self.went_back = Saved(tensors, info), 0

    def keep(self, updates: list[int]) -> None:
        raise AssertionError(updates)

    def fetch(self, update: int) -> Saved:
        assert update == self.saved.info["update"]
        return self.saved

    def go_on_from(self, state: TrainState) -> None:
        self.went_back += 1


@pytest.fixture
def state(tiny_sd3_folder) -> TrainState:
    base = SharedBase(copy_teacher(tiny_sd3_folder), fake_rank=2, fake_scale=1.0, student_rank=2, seed=0)
    optimizer = Optimizer(learning_rate=1e-3)
    return TrainState(base, Training(updates=9, batch_size=1, student=optimizer, fake_score=optimizer), ema=0.9)


def remedy(state: TrainState, *, rl: ReFL | None = REFL, has_fake: bool = True) -> Remedy:
    watch = Watch(reward="held-out", on_alarm="recover", recoveries=2)
    return Remedy(watch, "joint", rl, has_fake, OneState(state))


@pytest.mark.parametrize(
    ("figures", "changes", "halved"),
    [
        ([REWARD], {}, ["rl"]),
        ([SATURATION, WHITE], {}, ["fake_score"]),
        ([REWARD, DIVERSITY, FAKE_RISE], {}, ["student"]),
        ([REWARD, FAKE_LAG, FAKE_RISE], {}, ["student", "fake_score"]),
        ([REWARD], {"rl": None}, ["student"]),
        ([REWARD], {"has_fake": False}, ["student"]),
        ([REWARD], {"rl": REFL.model_copy(update={"start": 8})}, ["student"]),
        ([REWARD], {"rl": REFL.model_copy(update={"weight": 0.0})}, ["student"]),
        ([FAKE_RISE, GRADIENT, FLAT], {}, ["student"]),
        ([FAKE_LAG, BLACK], {}, ["fake_score"]),
        ([FAKE_LAG], {"has_fake": False}, ["student"]),
        ([NON_FINITE], {}, ["student", "fake_score"]),
        (blame(["loss_rl", "reward/lab-conv", "grad_student"]), {}, ["rl"]),
        (blame(["loss_dm", "loss_fake", "loss_rl", "grad_student"]), {}, ["student", "fake_score"]),
        (blame(["grad_student"]), {}, ["student", "fake_score"]),
        (blame(["grad_rl", "rl_weight"]), {}, ["rl"]),
    ],
)
def test_what_an_alarm_halves(state, figures, changes, halved):
    state.update = 5
    assert remedy(state, **changes).choose_halved(state, figures, 0) == halved


def test_an_alarm_that_rings_again_halves_the_students_rate_too(state):
    state.update = 5
    state.recoveries = [Recovery(update=5, back_to=0, figures=[REWARD], why="", halved=["rl"])]
    assert remedy(state).choose_halved(state, [REWARD], 0) == ["rl", "student"]
    assert remedy(state).choose_halved(state, [SATURATION], 0) == ["rl"]
    assert (state.slow_down("rl"), state.slow_down("student")) == (0.5, 1.0)


def test_a_plain_cause_stays_named_until_the_stage_gets_further(state):
    state.update = 5
    state.recoveries = [Recovery(update=5, back_to=4, figures=[REWARD, FAKE_RISE], why="", halved=["student"])]
    assert remedy(state).choose_halved(state, [REWARD], 4) == ["student"]
    assert remedy(state).choose_halved(state, [REWARD], 5) == ["rl"], "a later collapse is another one"
    assert remedy(state).choose_halved(state, [FAKE_LAG], 4) == ["fake_score"]


def test_going_back_leaves_no_trace_of_the_course_that_was_left(state):
    """A state before the first step, which has no moments, after two steps and a kept best EMA."""
    looks = [{"update": 0, NON_FINITE: 0.0, REWARD: 0.5}]
    cure = remedy(state)
    for _ in range(2):
        for trainable in state.trainables.values():
            for parameter in trainable.parameters.values():
                parameter.grad = torch.full_like(parameter, float("nan"))
            trainable.step()
        state.advance({"update": state.update})
    state.keep_best()
    plan = cure.plan(state, looks, [REWARD], "it fell")
    assert (plan.update, plan.back_to, plan.ends) == (2, 0, False)
    assert "goes back to update 0 and halves joint.student.learning_rate (recovery 1 of 2)" in cure.describe(
        state, plan
    )
    cure.apply(state, plan)
    assert isinstance(cure.vault, OneState) and cure.vault.went_back == 1
    saved, now = cure.vault.saved.tensors, state.tensors()
    assert now.keys() == saved.keys() and all(torch.equal(now[name], saved[name]) for name in saved)
    assert (state.update, state.rows, state.recoveries) == (0, [], [plan])
    again = TrainState.__new__(TrainState)
    again.recoveries = [Recovery.model_validate(each) for each in state.info()["recoveries"]]
    assert again.recoveries == state.recoveries


def test_the_last_recovery_ends_the_stage_and_none_has_nowhere_to_go(state):
    looks = [{"update": 0, NON_FINITE: 0.0, REWARD: 0.5}]
    made = Recovery(update=5, back_to=0, figures=[REWARD], why="", halved=["student"])
    state.update, state.recoveries = 5, [made, made]
    plan = remedy(state).plan(state, looks, [REWARD], "it fell")
    assert plan.ends and not plan.halved and "has recovered 2 times" in remedy(state).describe(state, plan)
    with pytest.raises(ConfigError, match=r"joint\.watch cannot recover at update 5 \(it fell\): no look before was"):
        remedy(state).plan(state, [{"update": 0, NON_FINITE: 0.5}], [REWARD], "it fell")
