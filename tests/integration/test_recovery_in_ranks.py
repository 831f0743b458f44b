"""Two processes that share the rows of the weights go back as one does; killed, they end with the same bits."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from dmdr.config.load import load_config
from tests.support.stage_process import command, finish, start
from tests.support.trained_run import run_stage, seal_stage
from tests.support.training_results import digests, results, steps_saved

pytestmark = pytest.mark.process

RATES = {"student": {"learning_rate": 1e-3}, "fake_score": {"learning_rate": 1e-3}}
WATCH = {
    "every": 2,
    "reward": "lab-mixer",
    "prompts": 5,
    "on_alarm": "recover",
    "recoveries": 2,
    "keep_best": 1,
    "sharpness_drop": 0.013,  # which this student loses
    "reward_drop": 9.0,
    "diversity_drop": 0.999,
    "saturation_rise": 9.0,
    "gradient_drop": 0.999,
    "fake_lag": 9.0,
}
JOINT = {"updates": 8, "batch_size": 3, "fake_updates": 2, **RATES, "watch": WATCH}


def recoveries(store: Path) -> list[dict]:
    made = json.loads((store / "tiny/joint/record.json").read_text())["facts"]["watch"]["recoveries"]
    return [{key: each[key] for key in ("update", "back_to", "figures", "halved", "ends")} for each in made]


def test_two_processes_recover_as_one_does(tiny_config, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def write(processes: int) -> Path:
        execution = {"device": "cpu", "checkpoint_every": 1, "processes": processes}
        sharded = {"sharding": "fsdp"} if processes > 1 else {}
        return tiny_config(execution={**execution, **sharded}, student={"steps": 2}, joint=JOINT)

    alone, whole, killed = (tmp_path / name for name in ("alone", "whole", "killed"))
    config = load_config(write(1))
    for stage in ("prompts", "cold_start"):
        seal_stage(config, alone, stage)
    for store in (whole, killed):
        shutil.copytree(alone, store)
    run_stage(config, alone, "joint")
    finish(command("joint", write(2), whole))
    assert recoveries(alone) and {tuple(each["halved"]) for each in recoveries(alone)} == {("student",)}
    assert recoveries(whole) == recoveries(alone)
    (ours, _), (theirs, _) = results(whole, "joint"), results(alone, "joint")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(value, theirs[name], atol=1e-4) for name, value in ours.items())  # a tenth of a step

    process = start(command("joint", write(2), killed))
    while "step-00000006" not in steps_saved(killed, "joint") and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 3.0))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(command("joint", write(2), killed))
    assert digests(killed, "joint") == digests(whole, "joint")
    assert recoveries(killed) == recoveries(whole)
