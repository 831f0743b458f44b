"""The training stages as processes: killed at random and resumed to the same bits, stopped, diverged, misfed."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest

from dmdr.config.load import load_config
from tests.support.stage_process import command, finish, start
from tests.support.trained_run import run_stage, seal_stage
from tests.support.training_results import digests, steps_saved

pytestmark = pytest.mark.process

KILLS = 3
UPDATES = 14


@pytest.mark.parametrize(("form", "family"), [("full", "sd3"), ("lora", "sdxl")])
def test_killed_training_ends_with_the_same_bits(tiny_config, tmp_path, request, form, family):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    training = {
        "updates": UPDATES,
        "batch_size": 2,
        "fake_updates": 2,
        "dynamic": {"updates": 8},
        "student": {"learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup": 3},
        "fake_score": {"learning_rate": 1e-3},
    }
    lora = {"lora_rank": 4, "lora_alpha": 6.0, "lora_init": "gaussian", "lora_targets": "wide"}
    student = {"steps": 2, "form": form, **(lora if form == "lora" else {})}
    path = str(request.getfixturevalue(f"tiny_{family}_folder"))
    config = tiny_config(
        run="tiny",
        cold_start=training,
        student=student,
        execution={"checkpoint_every": 1},
        teacher={"path": path, "guidance_scale": [2.5, 3.5]},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seal_stage(load_config(config), whole, "prompts")
    shutil.copytree(whole, killed)
    run_stage(load_config(config), whole, "cold_start")

    kills, resumed = 0, 0
    while kills < (KILLS if form == "full" else 2):
        before = steps_saved(killed, "cold_start")
        process = start(command("cold_start", config, killed))
        while steps_saved(killed, "cold_start") <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        err = process.communicate()[1]
        if process.returncode == 0:
            break  # it ended before the signal: nothing is left to kill
        assert process.returncode == -signal.SIGKILL, err
        kills, resumed = kills + 1, resumed + bool(before)
    assert kills >= 2 and resumed >= 1, f"{kills} kills, {resumed} of a resumed run"
    finish(command("cold_start", config, killed))
    print(f"{kills} kills, {resumed} of them of a resumed run")
    assert digests(killed, "cold_start") == digests(whole, "cold_start")


def test_sigterm_leaves_a_checkpoint_and_75(tiny_config, tmp_path):
    training = {
        "updates": 400,
        "batch_size": 2,
        "fake_updates": 2,
        "student": {"learning_rate": 1e-3},
        "fake_score": {"learning_rate": 1e-3},
    }
    config = tiny_config(run="tiny", cold_start=training, execution={"checkpoint_every": 5})
    seal_stage(load_config(config), tmp_path, "prompts")
    process = start(command("cold_start", config, tmp_path))
    while not steps_saved(tmp_path, "cold_start") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    last = max(steps_saved(tmp_path, "cold_start"))
    assert f"after update {int(last.removeprefix('step-'))} of 400" in err, err
    assert not (tmp_path / "tiny" / "cold_start" / "record.json").exists()


def test_divergence_is_one_line_and_keeps_the_checkpoint(tiny_config, tmp_path):
    training = {
        "updates": 50,
        "batch_size": 2,
        "fake_updates": 2,
        "student": {"learning_rate": 1e30},
        "fake_score": {"learning_rate": 1e-3},
    }
    config = tiny_config(run="tiny", cold_start=training, execution={"checkpoint_every": 1})
    seal_stage(load_config(config), tmp_path, "prompts")
    process = start(command("cold_start", config, tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 70, err
    last = err.strip().splitlines()[-1]
    assert "Traceback" not in err and "at update" in last and "lower the learning rates" in last
    assert steps_saved(tmp_path, "cold_start") and not (tmp_path / "tiny" / "cold_start" / "record.json").exists()
