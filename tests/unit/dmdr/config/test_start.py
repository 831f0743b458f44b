"""What a config may say of a student's start and of a run without a cold start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.errors import ConfigError

START = {"steps": 2, "start": {"path": "somewhere"}}


JOINT: dict[str, object] = {
    "updates": 2,
    "batch_size": 2,
    "student": {"learning_rate": 1e-4},
    "fake_score": {"learning_rate": 2e-4},
    "rl": {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}},
}


def test_a_run_without_a_cold_start_has_four_stages(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config(cold_start=None, student=START, joint={**JOINT, "fake_warmup": 3}))
    assert config.stages == ("prompts", "joint", "export", "evaluate")
    assert config.training_stages == ("joint",)
    assert config.evaluate.models == ("student", "teacher", "naive teacher", "start")
    with pytest.raises(ConfigError, match="no stage cold_start"):
        config.require_stage("cold_start", "--until")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cold_start": None}, "student.start is not set"),
        ({"cold_start": None, "student": START, "evaluate": {"metrics": [], "seeds": 2, "models": ["cold start"]}},
         "evaluate.models has cold start"),
        ({"evaluate": {"metrics": ["lab-mixer"], "models": ["start"]}}, "student.start is not set"),
        ({"joint": {**JOINT, "fake_warmup": 3}}, "the cold start has trained the fake score"),
        ({"cold_start": None, "student": START, "joint": {**JOINT, "fake_warmup": 3, "distribution_matching": False}},
         "distribution_matching: false does not use"),
        ({"cold_start": None, "student": START, "joint": {**JOINT, "fake_warmup": -1}}, "joint.fake_warmup"),
        ({"student": {"steps": 2, "start": {"path": "a", "scale": 0}}}, "student.start.scale"),
        ({"student": {"steps": 2, "start": {"path": "a", "alpha": 1}}}, "unknown key student.start.alpha"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    tiny_config: Callable[..., Path], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(tiny_config(**changes))
    assert "\n" not in str(refused.value)


def test_the_place_of_a_start_names_no_result(tiny_config: Callable[..., Path]) -> None:
    def identify(**start: object) -> dict[str, object]:
        student = {"steps": 2, "start": {"path": "here", **start}}
        return identity(load_config(tiny_config(cold_start=None, student=student)), "joint")

    assert identify() == identify(path="there")
    assert identify() != identify(scale=0.5)
    assert not any("path" in key for key in identify())


def test_a_run_without_a_start_keeps_its_identity(tiny_config: Callable[..., Path]) -> None:
    settings = identity(load_config(tiny_config()), "joint")
    assert not any("start" in key.split(".") or "fake_warmup" in key for key in settings)
