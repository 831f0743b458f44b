"""RL in the cold start, the reward-tilted one, and the schedule that turns RL on."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from dmdr.assembly.networks import assemble
from dmdr.assembly.run import build_run
from dmdr.assembly.stage_config import select_stage
from dmdr.config.identity import identity
from dmdr.config.rl import ReFL
from dmdr.draws import Run, list_prompts
from dmdr.errors import ConfigError
from dmdr.planning.plan import plan_stage
from dmdr.state import TrainState
from dmdr.train import train
from tests.support.few_prompts import FewPrompts
from tests.support.tiny_teachers import copy_teacher
from tests.unit.dmdr.test_decoupled import load_changed

TEXTS = ["a red circle", "two squares", "a cross left of a circle", "three triangles"]
REFL = {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}}
BRANCHES = {"algorithm": "grpo", "weight": 0.5, "rewards": {"lab-conv": 1.0}, "branches": 2, "states": 2}
WHOLE = {**BRANCHES, "branches": 0, "batch": 2, "group_size": 2, "inner_updates": 2}
del WHOLE["states"]


def begin(path: Path, rl: dict | None, updates: int = 4, **changes) -> tuple[Run, TrainState]:
    """The cold start of a tiny config with this RL."""
    config = load_changed(path, cold_start__rl=rl, cold_start__updates=updates, cold_start__fake_updates=3, **changes)
    backbone = copy_teacher(Path(config.teacher.path))
    stage = select_stage(config, "cold_start")
    assembly = assemble(config, stage, backbone)
    prompts = FewPrompts(backbone, TEXTS)
    empty = backbone.encode_unconditional("pipeline")
    return build_run(config, stage, assembly, prompts=prompts, empty_prompt=empty), assembly.state


def go(run: Run, state: TrainState, updates: int) -> list[dict]:
    return list(islice(train(run, state, stop=lambda: False), updates))


def equal(first: TrainState, second: TrainState) -> bool:
    ours, theirs = first.tensors(), second.tensors()
    shared = {name for name in ours if name.startswith(("student", "fake_score", "ema"))}
    return all(torch.equal(ours[name], theirs[name]) for name in shared)


@pytest.mark.parametrize("rl", [REFL, BRANCHES, WHOLE, {**REFL, "weight_is": "matched", "matching": 2}])
def test_before_its_start_rl_changes_no_bit(rl, tiny_config):
    path = tiny_config()
    plain, tilted = begin(path, None), begin(path, {**rl, "start": 2})
    assert go(*plain, 2) == go(*tilted, 2)
    assert equal(plain[1], tilted[1])
    (without,), (row,) = go(*plain, 1), go(*tilted, 1)
    assert "reward/lab-conv" in row and "reward/lab-conv" not in without and row["rl_weight"] > 0
    assert not equal(plain[1], tilted[1])


def test_the_weight_rises_over_the_ramp(tiny_config):
    run, state = begin(tiny_config(), {**REFL, "start": 1, "ramp": 2})
    rows = go(run, state, 4)
    assert [row.get("rl_weight") for row in rows] == [None, 0.25, 0.5, 0.5]
    shares = [ReFL(**REFL, start=3, ramp=4).weight_share(update) for update in range(9)]
    assert shares == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert ReFL(**REFL).weight_share(0) == 1, "from update 0 by default"


def test_the_prompts_that_are_asked_for_ahead_are_those_that_come(tiny_config):
    """Also where RL, with prompts of its own, begins."""
    run, state = begin(tiny_config(), {**WHOLE, "start": 2})
    ahead: list[list[int]] = []
    go(replace(run, prepare=ahead.append), state, 4)
    assert [sorted(each) for each in ahead] == [
        sorted(index for each in list_prompts(run.at(update), update) for index in each) for update in (1, 2, 3)
    ]


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_tilted_cold_start_goes_on_to_the_same_bits(stopped_after, tiny_config):
    """Before RL begins, and within its ramp and the updates that match its weight."""
    path, rl = tiny_config(), {**BRANCHES, "start": 1, "ramp": 2, "weight_is": "matched", "matching": 2}
    whole, parted, again = begin(path, rl), begin(path, rl), begin(path, rl)
    go(*whole, 4)
    go(*parted, stopped_after)
    again[1].restore({name: value.clone() for name, value in parted[1].tensors().items()}, parted[1].info())
    go(*again, 4 - stopped_after)
    assert again[1].rows == whole[1].rows and equal(again[1], whole[1])


def test_a_config_with_rl_in_both_stages_knows_all_its_rewards(tiny_config):
    path = tiny_config()
    own = {"mine": {"entry_point": "mine"}}
    tilt = {**REFL, "rewards": {"lab-mixer": 2.0, "lab-conv": 3.0}}
    config = load_changed(path, cold_start__rl=tilt)
    assert config.trained_rewards == {"lab-mixer": 2.0, "lab-conv": 1.0}
    assert config.list_rewards("cold_start") == {"lab-mixer", "lab-conv"} == config.list_training_rewards()
    assert list(config.list_rl()) == ["cold_start", "joint"]
    assert config.list_uses()["cold_start.rl.rewards"] == ("lab-mixer", "lab-conv")
    assert identity(config, "cold_start")["cold_start.rl.rewards.lab-mixer"] == 2.0
    assert identity(config, "evaluate")["cold_start.rl.rewards.lab-mixer"] == 2.0
    named = load_changed(path, cold_start__rl={**REFL, "rewards": {"mine": 1.0}}, rewards=own)
    assert named.list_rewards("cold_start") == {"mine"}


def test_defaults_are_no_part_of_the_identity(tiny_config):
    path = tiny_config()
    stages = ("cold_start", "joint", "evaluate")
    plain = {key for stage in stages for key in identity(load_changed(path), stage)}
    assert not [key for key in plain if key.startswith("cold_start.rl") or key.endswith((".start", ".ramp"))]
    later = identity(load_changed(path, joint__rl={**REFL, "start": 1, "ramp": 1}), "joint")
    assert (later["joint.rl.start"], later["joint.rl.ramp"]) == (1, 1)


def test_a_plan_counts_the_reward_of_a_tilted_cold_start(tiny_config):
    path = tiny_config()
    plain, tilted = (plan_stage(load_changed(path, cold_start__rl=rl), "cold_start") for rl in (None, REFL))
    assert tilted.work["reward"] > 0 and "reward" not in plain.work
    assert tilted.parts["rewards"] > plain.parts["rewards"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cold_start__rl": {**REFL, "algorithm": "ppo"}}, "cold_start.rl.algorithm is ppo; set one of refl, dpo"),
        ({"cold_start__rl": {**REFL, "strat": 1}}, "unknown key cold_start.rl.strat; did you mean start"),
        ({"cold_start__rl": {**REFL, "margin": 1.0}}, "cold_start.rl.margin is set but cold_start.rl.map is linear"),
        ({"cold_start__rl": {**REFL, "start": 2}}, "cold_start.rl.start is 2 but its stage has 2 updates, so RL would"),
        ({"joint__rl": {**REFL, "start": 1, "ramp": 2}}, "joint.rl.ramp 2 from update 1 on ends after the 2 updates"),
        (
            {"joint__rl": {**REFL, "start": 1}, "joint__distribution_matching": False},
            "joint.rl.start is 1 but joint.distribution_matching is false: nothing would be trained until then",
        ),
        (
            {"cold_start__rl": {**BRANCHES, "inner_updates": 2}},
            "cold_start.rl.inner_updates 2 needs as many batches of cold_start.fake_updates 2",
        ),
        (
            {"cold_start__rl": BRANCHES, "student__eta": 0.0},
            "cold_start.rl.algorithm grpo learns from the noise of the renoising steps and student.eta 0",
        ),
        (
            {"cold_start__rl": {**REFL, "rewards": {"ocr": 1.0}}},
            "cold_start.rl.algorithm refl needs a gradient, and the reward ocr has none",
        ),
        ({"cold_start__rl": {**REFL, "rewards": {"lab-con": 1.0}}}, "unknown reward lab-con; did you mean lab-conv"),
        (
            {"cold_start__rl": {**REFL, "rewards": {"lab-mixer": 1.0}}, "joint__watch": {"reward": "lab-mixer"}},
            "joint.watch.reward lab-mixer is trained on; watch one that is not in cold_start.rl.rewards",
        ),
        (
            {
                "cold_start__rl": {**BRANCHES, "states": 1},
                "execution__processes": 2,
                "cold_start__batch_size": 4,
                "joint__batch_size": 4,
            },
            "cold_start.rl.states 1 cannot be shared evenly",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_name_of_its_stage(changes, message, tiny_config):
    with pytest.raises(ConfigError, match=message):
        load_changed(tiny_config(), **changes)


def test_a_teacher_of_another_world_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="cold_start.rl.rewards has lab-conv, which knows only the lab's"):
        load_changed(tiny_config(), cold_start__rl=REFL, joint__rl=None, teacher__world="fashion")
