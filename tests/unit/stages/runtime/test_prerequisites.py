"""What can be known before training is refused by the first stage, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.stages import STAGES
from dmdr.errors import ConfigError, DataError, InputMissing
from dmdr.lab.origin import read_world
from dmdr.teacher.load import LAB
from stages import prompts
from stages.__main__ import main
from stages.runtime.prerequisites import check_evaluation, check_training, check_worlds, load_rewards
from tests.support.trained_run import context_for, run_stage

REFL = {"algorithm": "refl", "weight": 0.5}
HUB = f"hub:owner/model@{'0' * 40}"


def teacher(path: object, **more: object) -> dict:
    return {"path": str(path), "guidance_scale": 3.0, "steps": 3, **more}


@pytest.mark.parametrize(
    ("path", "world", "told"),
    [
        ("lab:fashion", None, "joint.rl.rewards has lab-conv, which knows only the lab's coloured shapes.*garments"),
        (HUB, None, "joint.rl.rewards has lab-conv.*is no teacher of the lab; name a real one such as hpsv2.1"),
        (HUB, "fashion", "draws the lab's tinted garments"),
    ],
)
def test_the_config_refuses_what_its_addresses_tell(tiny_config: Callable[..., Path], path: str, world, told: str):
    with pytest.raises(ConfigError, match=told) as refusal:
        load_config(tiny_config(teacher=teacher(path, world=world)))
    assert "\n" not in str(refusal.value)


def test_a_folder_is_the_labs_if_the_lab_built_it_or_the_config_says_so(
    tiny_config: Callable[..., Path], tiny_sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    foreign = load_config(tiny_config(teacher=teacher(tiny_sd3_folder, world=None)))
    with pytest.raises(ConfigError, match=r"lab-conv.*is no teacher of the lab.*teacher\.world: shapes"):
        check_worlds(foreign)
    check_worlds(load_config(tiny_config(teacher=teacher(tiny_sd3_folder, world="shapes"))))
    shutil.copytree(LAB / "flow", tmp_path / "mine")
    check_worlds(load_config(tiny_config(teacher=teacher(tmp_path / "mine", world=None))))
    assert [read_world(LAB / name) for name in ("flow", "denoising", "fashion")] == ["shapes", "shapes", "fashion"]

    path = tiny_config(teacher=teacher(tiny_sd3_folder, world=None))
    assert main(["prompts", "--config", str(path), "--store", str(tmp_path / "store")]) == 64
    assert "is no teacher of the lab" in capsys.readouterr().err


def test_a_stated_world_names_no_result(tiny_config: Callable[..., Path], tiny_sd3_folder: Path):
    with_it, without = (
        load_config(tiny_config(teacher=teacher(tiny_sd3_folder, world=world), joint=joint, evaluate=evaluate))
        for world, joint, evaluate in [
            ("shapes", {**TRAINING, "rl": None}, {"metrics": ["aesthetic"]}),
            (None, {**TRAINING, "rl": None}, {"metrics": ["aesthetic"]}),
        ]
    )
    for stage in STAGES:
        assert identity(with_it, stage) == identity(without, stage)


TRAINING = {
    "updates": 2,
    "batch_size": 2,
    "fake_updates": 2,
    "student": {"learning_rate": 1e-4},
    "fake_score": {"learning_rate": 2e-4},
}


@pytest.mark.parametrize(
    ("evaluate", "weights", "kind", "told"),
    [
        ({"metrics": ["lab-checker"]}, {}, ConfigError, "none of the 6 evaluation prompts has GenEval metadata"),
        ({"metrics": ["lab-mixer", "dpg-bench"]}, {}, ConfigError, "evaluation prompts has an item_id"),
        ({"metrics": ["aesthetic"]}, {"aesthetic": "/no/such"}, InputMissing, "no metric has its weights .*aesthetic"),
        (
            {"metrics": ["lab-mixer"], "pipelines": {"Other": {"path": "/no/such", "steps": 2}}},
            {},
            InputMissing,
            "evaluate.pipelines.Other.path /no/such: no such folder",
        ),
    ],
)
def test_evaluation_is_checked_before_anything_is_trained(
    tiny_config: Callable[..., Path], tmp_path: Path, evaluate: dict, weights: dict, kind: type[Exception], told: str
):
    context = context_for(load_config(tiny_config(evaluate=evaluate, weights=weights)), tmp_path, "prompts")
    with pytest.raises(kind, match=told):
        prompts.run(context)
    assert not list(context.out.iterdir())


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("ocr", "has ocr, but 14 of 14 training prompts .* 'a red circle', which has no text in quotation marks"),
        ("geneval", r"has geneval, but 14 of 14 training prompts .* has no metadata \(tag, include\)"),
        ("lab-checker-soft", r"has lab-checker-soft, but 14 of 14 .* has no metadata"),
    ],
)
def test_prompts_that_a_reward_cannot_check_are_refused_before_anything_is_trained(
    tiny_config: Callable[..., Path], tmp_path: Path, reward: str, told: str
):
    rl = {"algorithm": "grpo", "weight": 1.0, "branches": 2, "states": 4, "rewards": {reward: 1.0}}
    weights = {"mask2former": "/no/such", "clip-vit-l-14": "/no/such"} if reward == "geneval" else {}
    config = load_config(tiny_config(joint={**TRAINING, "rl": rl}, weights=weights))
    context = context_for(config, tmp_path, "prompts")
    with pytest.raises(ConfigError, match=told):
        prompts.run(context)
    assert not list(context.out.iterdir())


def test_a_metric_without_weights_is_only_told_where_another_has_them(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    changes = {"evaluate": {"metrics": ["lab-mixer", "aesthetic"]}, "weights": {"aesthetic": "/no/such"}}
    run_stage(load_config(tiny_config(**changes)), tmp_path / "store", "prompts")
    assert "evaluate will leave aesthetic out: weights.aesthetic /no/such" in capsys.readouterr().err


def test_the_weights_of_rewards_are_read_before_anything_is_trained(tiny_config: Callable[..., Path], tmp_path: Path):
    (tmp_path / "hps.pt").write_text("no weights")
    rl = {**REFL, "rewards": {"hpsv2.1": 1.0}}
    for address, kind, told in [
        (str(tmp_path / "hps.pt"), DataError, "hps.pt .* cannot be read"),
        ("/no/such.pt", InputMissing, "weights.hpsv2.1 /no/such.pt does not exist"),
    ]:
        config = load_config(tiny_config(joint={**TRAINING, "rl": rl}, weights={"hpsv2.1": address}))
        with pytest.raises(kind, match=told):
            check_training(config)
            load_rewards(config)


def test_a_stage_with_another_image_looks_for_its_weights_itself(tiny_config: Callable[..., Path]):
    rl = {**REFL, "rewards": {"hpsv2.1": 1.0}}
    nowhere = {"hpsv2.1": "/no/such.pt"}
    image = "images.example.org/dmdr@sha256:" + "1" * 64
    for images, is_checked in (({}, True), ({"joint": image.replace("1", "2"), "evaluate": image[:-1] + "3"}, False)):
        stages = {stage: {"image": name} for stage, name in images.items()}
        execution = {"device": "cpu", "cluster": {"image": image, "stages": stages}}
        joint, evaluate = {**TRAINING, "rl": rl}, {"metrics": ["hpsv2.1"]}
        config = load_config(tiny_config(joint=joint, evaluate=evaluate, weights=nowhere, execution=execution))
        checks = (check_training, load_rewards, lambda each: check_evaluation(each, [], lambda line: None))
        for check in checks:
            with pytest.raises(InputMissing) if is_checked else nullcontext():
                check(config)


def test_a_resolution_that_the_teacher_cannot_draw_is_refused(
    tiny_config: Callable[..., Path], tiny_sd3_folder: Path, tmp_path: Path
):
    config = load_config(tiny_config(teacher=teacher(tiny_sd3_folder, resolution=17)))
    with pytest.raises(DataError, match=r"teacher\.resolution 17 is not a multiple"):
        prompts.run(context_for(config, tmp_path, "prompts"))


def test_a_size_without_positions_is_refused(
    tiny_config: Callable[..., Path], tiny_z_image_folder: Path, tmp_path: Path
):
    config = load_config(tiny_config(teacher=teacher(tiny_z_image_folder)))
    with pytest.raises(DataError, match=r"resolution is 1024, but .* 64 patches a side .* set it to 256 or less"):
        prompts.run(context_for(config, tmp_path, "prompts"))


def test_settings_that_changed_after_the_prompts_are_checked_by_the_next_stage(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    run_stage(load_config(tiny_config()), tmp_path / "store", "prompts")
    path = tiny_config(evaluate={"metrics": ["lab-checker"]})
    assert main(["cold_start", "--config", str(path), "--store", str(tmp_path / "store")]) == 64
    assert "cold_start: evaluate.metrics asks for lab-checker" in capsys.readouterr().err
    sealed = json.loads((tmp_path / "store" / "tiny" / "prompts" / "record.json").read_text())
    assert sealed["stage"] == "prompts"
