"""A batch that the processes cannot share is refused where the config is read, before a stage or a Job starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr import distributed
from dmdr.config.batches import RLBatch, check_split, count_parts, count_rl, count_student_forwards
from dmdr.config.load import load_config
from dmdr.config.rl import DPO, GRPO, EvolutionStrategies, ReFL
from dmdr.config.training import Joint, Optimizer
from dmdr.errors import ConfigError

RATE = {"learning_rate": 1e-4}
TRAINING = {"updates": 2, "batch_size": 4, "fake_updates": 2, "student": RATE, "fake_score": RATE}
IMAGE = f"images.example.org/dmdr-train@sha256:{'1' * 64}"


def on_nodes(nodes: int, processes: int = 1, **more: object) -> dict:
    """The section execution of a config whose two training stages run on several nodes."""
    stages = {"cold_start": {"nodes": nodes}, "joint": {"nodes": nodes}}
    return {"device": "cpu", "processes": processes, "cluster": {"image": IMAGE, "stages": stages}, **more}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"execution": {"device": "cpu", "processes": 8}},
            "cold_start.batch_size 4 cannot be split over 8 processes; make it 8 or more, or use fewer",
        ),
        ({"execution": on_nodes(2, 4)}, "cold_start.batch_size 4 cannot be split over 8 processes"),
        ({"execution": on_nodes(8)}, "cold_start.batch_size 4 cannot be split over 8 processes"),
        (
            {"execution": on_nodes(2), "cold_start": {**TRAINING, "batch_size": 2, "fake_updates": 1}},
            "cold_start.batch_size 2 needs 1 prompt an update, fewer than 2 processes; raise it, or use fewer",
        ),
        (
            {"execution": on_nodes(2, micro_batch_size=1), "cold_start": {**TRAINING, "batch_size": 3}},
            "cold_start.batch_size 3 is to be shared among 2 processes, 1 for some and 2 for others",
        ),
    ],
    ids=["processes", "nodes and processes", "nodes", "prompts", "parts"],
)
def test_what_cannot_be_shared_is_refused_as_the_config_is_read(tiny_config: Callable[..., Path], changes, said):
    training = {"cold_start": TRAINING, "joint": TRAINING}
    with pytest.raises(ConfigError) as refusal:
        load_config(tiny_config(**training | changes))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_can_be_shared_is_not(tiny_config: Callable[..., Path]):
    load_config(tiny_config(cold_start=TRAINING, joint=TRAINING, execution=on_nodes(2)))
    larger = {**TRAINING, "batch_size": 8}
    load_config(tiny_config(cold_start=larger, joint=larger, execution=on_nodes(2, 2)))


REWARD = {"weight": 1.0, "rewards": {"lab-conv": 1.0}}
GROUPS = {"weight": 1.0, "rewards": {"lab-conv": 1.0}, "branches": 0, "batch": 12, "group_size": 6}
STATES = {"weight": 1.0, "rewards": {"lab-conv": 1.0}, "branches": 4, "states": 9}


@pytest.mark.parametrize(
    ("rl", "ranks", "micro_batch", "said"),
    [
        (DPO(algorithm="dpo", **GROUPS), 2, None, None),
        (DPO(algorithm="dpo", **GROUPS), 3, None, "joint.rl.batch 12 cannot be shared evenly among 3 processes"),
        (GRPO(algorithm="grpo", **STATES), 3, None, None),
        (GRPO(algorithm="grpo", **STATES), 3, 4, None),
        (GRPO(algorithm="grpo", **STATES), 4, None, "joint.rl.states 9 cannot be shared evenly among 4 processes"),
        (EvolutionStrategies(algorithm="es", **REWARD, states=48), 3, 2, None),
        (EvolutionStrategies(algorithm="es", **REWARD, states=49), 1, None, "joint.rl.states 49 is more than the 48 "),
        (EvolutionStrategies(algorithm="es", **REWARD, states=3), 4, None, "joint.rl.states 3 cannot be shared evenly"),
    ],
    ids=[
        "groups",
        "too few groups",
        "states",
        "states in parts",
        "too few states",
        "es",
        "es, too many",
        "es, too few",
    ],
)
def test_what_rl_samples_is_shared_too(rl, ranks, micro_batch, said):
    training = Joint(updates=1, batch_size=12, fake_updates=5, student=Optimizer(**RATE), fake_score=Optimizer(**RATE))
    if said is None:
        check_split("joint", training, rl, steps=4, ranks=ranks, micro_batch=micro_batch)
    else:
        with pytest.raises(ConfigError, match=said):
            check_split("joint", training, rl, steps=4, ranks=ranks, micro_batch=micro_batch)


def test_what_rl_samples_and_trains_is_what_the_settings_say():
    assert count_rl(DPO(algorithm="dpo", **GROUPS), 4) == RLBatch(12, 6, states=2 * 2 * 3, block=2)
    inner = GRPO(algorithm="grpo", inner_updates=2, **GROUPS)
    assert count_rl(inner, 4) == RLBatch(12, 6, states=36, inner_updates=2)
    assert count_rl(GRPO(algorithm="grpo", **STATES), 4) == RLBatch(states=9, branches=4)
    assert count_rl(EvolutionStrategies(algorithm="es", **REWARD), 4) == RLBatch(states=32)
    assert count_rl(ReFL(algorithm="refl", weight=1.0, rewards={"lab-conv": 1.0}), 4) == count_rl(None, 4) == RLBatch()
    assert count_student_forwards(GRPO(algorithm="grpo", **STATES), 4) == 4 * 3 * (3 + 2 + 1)
    hybrid = GRPO(algorithm="grpo", hybrid=True, **STATES | {"states": 8})
    assert count_student_forwards(hybrid, 4) == 4 * 2 * (3 + 2 + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_are_counted_as_the_ranks_cut_them(monkeypatch: pytest.MonkeyPatch, ranks: int):
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    for count in range(1, 30):
        for most in (None, 1, 2, 5):
            assert count_parts(count, ranks, most) == len(distributed.split_batches(slice(0, 0), count, most))
