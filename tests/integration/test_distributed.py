"""Training stages in several processes, started for real: the same losses and weights as one process has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmdr.config.load import load_config
from dmdr.errors import ConfigError
from stages.runtime import ranks
from tests.support.stage_process import command, finish, start
from tests.support.trained_run import run_stage, seal_stage
from tests.support.training_results import TRAINING, assert_same, results

pytestmark = pytest.mark.process


def together(tiny_config: Callable[..., Path], processes: int, sharding: str = "none", **changes: object) -> Path:
    execution = {"device": "cpu", "checkpoint_every": 2, "processes": processes, "sharding": sharding}
    return tiny_config(**{"execution": execution, "cold_start": TRAINING, **changes})


@pytest.mark.parametrize(
    ("form", "shardings", "joint"),
    [
        (
            "full",
            ("none", "fsdp"),
            {
                "rl": {"algorithm": "refl", "weight": 0.5, "weight_is": "matched", "rewards": {"lab-conv": 1.0}},
                "watch": {"every": 2, "reward": "lab-mixer", "prompts": 5, "export": "best"},
            },
        ),
        (
            "lora",
            ("fsdp",),
            {
                "rl": {
                    "algorithm": "grpo",
                    "weight": 2.0,
                    "branches": 3,
                    "states": 3,
                    "rewards": {"lab-conv": 1.0},
                },
                "batch_size": 5,
            },
        ),
        (
            "full",
            ("none",),
            {
                "rl": {
                    "algorithm": "dpo",
                    "weight": 2.0,
                    "branches": 0,
                    "batch": 6,
                    "group_size": 3,
                    "rewards": {"lab-conv": 1.0},
                },
                "batch_size": 6,
                "distribution_matching": False,
            },
        ),
    ],
    ids=["refl-matched-watched", "grpo-lora", "dpo-alone"],
)
def test_two_processes_end_where_one_does(tiny_config, tmp_path, form, shardings, joint):
    """Ranks get 1 and 2 states of a batch of 3, of distribution matching's and of RL's."""
    student = {"steps": 2, "form": form, **({"lora_rank": 4} if form == "lora" else {})}
    alone, both = tmp_path / "1", tmp_path / "2"

    def run(stage: str, store: Path, processes: int, sharding: str = "none") -> None:
        config = together(tiny_config, processes, sharding, student=student, joint={**TRAINING, **joint})
        if processes > 1:
            finish(command(stage, config, store))
        else:
            run_stage(load_config(config), store, stage)

    run("prompts", alone, 1)
    shutil.copytree(alone / "tiny/prompts", both / "tiny/prompts")
    run("cold_start", alone, 1)
    run("cold_start", both, 2, shardings[-1])
    assert_same(both, alone, "cold_start")

    shutil.rmtree(both / "tiny/cold_start")
    shutil.copytree(alone / "tiny/cold_start", both / "tiny/cold_start")
    run("joint", alone, 1)
    for sharding in shardings:
        run("joint", both, 2, sharding)
        assert_same(both, alone, "joint")
        shutil.rmtree(both / "tiny/joint")


def test_distillation_is_the_same_bits_beside_rl_of_weight_0_in_two_processes(tiny_config, tmp_path):
    """Branches of GRPO, whose gradient each rank sums apart."""
    sealed, store, alone = [], tmp_path / "store", load_config(together(tiny_config, 1))
    for stage in ("prompts", "cold_start"):
        seal_stage(alone, store, stage)
    for weighted in (None, {"algorithm": "grpo", "weight": 0.0, "branches": 3, "states": 3}):
        rl = None if weighted is None else {**weighted, "rewards": {"lab-conv": 1.0}}
        config = together(tiny_config, 2, joint={**TRAINING, "updates": 2, "dynamic": {"updates": 2}, "rl": rl})
        finish(command("joint", config, store))
        weights, rows = results(store, "joint")
        sealed.append((weights, [row["loss_dm"] for row in rows]))
        shutil.rmtree(store / "tiny/joint")
    (expected, losses), (beside, losses_beside) = sealed
    assert losses == losses_beside and expected.keys() == beside.keys()
    assert all(torch.equal(expected[name], beside[name]) for name in expected)


def test_torchrun_may_start_the_ranks(tiny_config, tmp_path, monkeypatch):
    config = together(tiny_config, 1)
    seal_stage(load_config(config), tmp_path, "prompts")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish([*torchrun, "-m", *command("cold_start", config, tmp_path)])
    record = json.loads((tmp_path / "tiny/cold_start/record.json").read_text())
    assert record["processes"] == 2
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="export runs in one process, but torchrun started 2"):
        ranks.count_processes(load_config(config), "export")


@pytest.mark.parametrize("who", ["all", "one"])
def test_sigterm_on_any_rank_leaves_one_checkpoint_and_75(tiny_config, tmp_path, who):
    config = together(tiny_config, 2, cold_start={**TRAINING, "updates": 4000})
    seal_stage(load_config(config), tmp_path, "prompts")
    process = start(command("cold_start", config, tmp_path))
    checkpoints = tmp_path / "tiny/cold_start/checkpoints"
    while not list(checkpoints.glob("*/manifest.json")) and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(process.pid if who == "all" else int(children[1]), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    newest = max(path.parent.name for path in checkpoints.glob("*/manifest.json"))
    told = [line for line in err.splitlines() if "stopped after update" in line]
    assert len(told) == 1 and f"after update {int(newest.removeprefix('step-'))} of 4000" in told[0], err
    assert "Traceback" not in err


def find_free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def test_two_machines_of_two_processes_end_where_one_process_does(tiny_config, tmp_path):
    """HSDP: each machine has all weights of a full student, its processes have half of the rows each. One of the two
    writes them to a checkpoint, and any number of processes reads it."""
    training = {**TRAINING, "batch_size": 8, "updates": 3}
    alone, both = tmp_path / "1", tmp_path / "2-2"
    config = together(tiny_config, 1, student={"steps": 2, "form": "full"}, cold_start=training)
    for stage in ("prompts", "cold_start"):
        run_stage(load_config(config), alone, stage)
    shutil.copytree(alone / "tiny/prompts", both / "tiny/prompts")
    execution = {"device": "cpu", "processes": 2, "sharding": "hsdp", "checkpoint_every": 2}
    config = together(tiny_config, 2, student={"steps": 2, "form": "full"}, cold_start=training, execution=execution)
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    machines = [start(command("cold_start", config, both), **shared, NODE_RANK=str(number)) for number in range(2)]
    told = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(told)
    assert_same(both, alone, "cold_start")


def test_one_machine_is_no_place_for_hsdp(tiny_config, tmp_path):
    config = together(
        tiny_config, 2, "hsdp", student={"steps": 2, "form": "full"}, cold_start={**TRAINING, "batch_size": 4}
    )
    seal_stage(load_config(config), tmp_path, "prompts")
    told = finish(command("cold_start", config, tmp_path), 64)
    assert "execution.sharding is hsdp" in told and "set fsdp" in told and "Traceback" not in told
