"""A batch that the processes cannot share is refused where the config is read, before a stage or a Job starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr import distributed
from dmdr.config.batches import check_split, count_parts, describe_rollout
from dmdr.config.load import load_config
from dmdr.config.training import DPO, GRPO, Optimizer, ReFL, Training
from dmdr.errors import ConfigError
from dmdr.rl import dpo, grpo, refl

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
            "cold_start.batch_size 3 makes 3 to share among 2 processes, 1 for some and 2 for others",
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


def test_pairs_and_groups_stay_together():
    training = Training(
        updates=1, batch_size=4, fake_updates=5, student=Optimizer(**RATE), fake_score=Optimizer(**RATE)
    )
    preferences = DPO(algorithm="dpo", weight=1.0, rewards={"lab-conv": 1.0}, group_size=4)
    check_split("joint", training, preferences, steps=2, ranks=2, micro_batch=None)
    with pytest.raises(ConfigError, match="cannot be split over 4 processes in blocks of 2; make it 8 or more"):
        check_split("joint", training, preferences, steps=2, ranks=4, micro_batch=None)


def test_the_algorithms_ask_for_what_the_settings_say():
    of_group = {"weight": 1.0, "rewards": {"lab-conv": 1.0}, "group_size": 6}
    asked = describe_rollout(DPO(algorithm="dpo", **of_group))
    assert (asked.inner_updates, asked.block) == (dpo.DPO.inner_updates, dpo.DPO.block)
    assert (asked.group_size, asked.oversampling) == (6, 3.0)
    asked = describe_rollout(GRPO(algorithm="grpo", inner_updates=2, **of_group))
    assert (asked.oversampling, asked.block) == (grpo.GRPO.oversampling, grpo.GRPO.block)
    assert (asked.group_size, asked.inner_updates) == (6, 2)
    asked = describe_rollout(ReFL(algorithm="refl", weight=1.0, rewards={"lab-conv": 1.0}))
    known = refl.ReFL
    assert (asked.group_size, asked.oversampling, asked.inner_updates, asked.block) == (
        known.group_size,
        known.oversampling,
        known.inner_updates,
        known.block,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_are_counted_as_the_ranks_cut_them(monkeypatch: pytest.MonkeyPatch, ranks: int):
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    for count in range(1, 30):
        for most in (None, 1, 2, 5):
            assert count_parts(count, ranks, most) == len(distributed.split_batches(slice(0, 0), count, most))
