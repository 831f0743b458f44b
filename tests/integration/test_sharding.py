"""Checkpoints of weights that are split over ranks: no pickle, killed in the middle, read by any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from dmdr.config.load import load_config
from tests.support.stage_process import command, finish, start
from tests.support.trained_run import run_stage, seal_stage
from tests.support.training_results import TRAINING, assert_same

pytestmark = pytest.mark.process

UPDATES = 6


def whole_steps(store: Path) -> list[int]:
    found = (store / "tiny/cold_start/checkpoints").glob("*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def killed(config: Path, store: Path, ranks: int) -> None:
    """Run the cold start until it has a checkpoint, then SIGKILL each process of it."""
    process = start(command("cold_start", config, store))
    while not whole_steps(store) and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if ranks > 1 else []
    assert len(children) == (ranks if ranks > 1 else 0)
    for pid in (*map(int, children), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert whole_steps(store)[-1] < UPDATES, "nothing was left to do"


def test_killed_on_two_ranks_resumed_on_one_and_the_reverse(tiny_config, tmp_path):
    training = {**TRAINING, "updates": UPDATES}

    def config(ranks: int) -> Path:
        execution = {"device": "cpu", "checkpoint_every": 1, "processes": ranks, "sharding": "fsdp"}
        return tiny_config(cold_start=training, execution=execution)

    uninterrupted, reverse, split = (tmp_path / name for name in ("1", "1-2", "2-1"))
    seal_stage(load_config(config(1)), uninterrupted, "prompts")
    for store in (reverse, split):
        shutil.copytree(uninterrupted / "tiny/prompts", store / "tiny/prompts")
    run_stage(load_config(config(1)), uninterrupted, "cold_start")

    killed(config(2), split, 2)
    newest = split / f"tiny/cold_start/checkpoints/step-{whole_steps(split)[-1]:08d}"
    files = {path.name for path in newest.iterdir()}
    assert files == {"state.safetensors", "state.1.safetensors", "state.json", "manifest.json"}
    assert json.loads((newest / "manifest.json").read_text())["files"].keys() == files - {"manifest.json"}
    name = "student/param/transformer_blocks.0.attn.to_q.weight"
    for file in ("state.safetensors", "state.1.safetensors"):
        with safe_open(newest / file, framework="pt") as rows:
            assert all(
                rows.get_slice(f"{key}{name[13:]}").get_shape() == [16, 32]
                for key in ("student/param", "student/exp_avg", "ema")
            )
    finish(command("cold_start", config(1), split))
    assert_same(split, uninterrupted, "cold_start")

    killed(config(1), reverse, 1)
    assert "continues from its checkpoint" in finish(command("cold_start", config(2), reverse))
    assert_same(reverse, uninterrupted, "cold_start")
