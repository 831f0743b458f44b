"""A joint run whose reward lives in another process, which is killed and started again in the middle of it."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import yaml

from dmdr.config.load import load_config
from dmdr.errors import RewardUnavailable
from tests.support.stage_process import Process, command, finish, start
from tests.support.trained_run import seal_stage
from tests.support.training_results import digests, steps_saved

CODE = """import time

class Brightness:
    differentiable, version, range = False, "1", (0.0, 1.0)
    def __init__(self, device): pass
    def __call__(self, images, prompts, metadata):
        assert all(each["prompt"] for each in metadata)
        time.sleep(0.05)  # so that the run is met in its middle
        return images.mean((1, 2, 3))
"""
UPDATES = 8


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(file: Path, port: int) -> Process:
    """`dmdr serve-reward` as a process that answers."""
    process = start(["flows.cli", "serve-reward", f"{file}:Brightness", "--port", str(port)])
    assert "digest" in process.stdout.readline(), process.communicate()[1]
    return process


def end(process: Process) -> None:
    process.kill()
    process.communicate()


def last_step(store: Path) -> int:
    """The update of the newest checkpoint; 0 before the first."""
    return max((int(name.rpartition("-")[2]) for name in steps_saved(store, "joint")), default=0)


def wait_for_checkpoint(store: Path, stage: Process) -> None:
    """Until the stage is in its middle."""
    while last_step(store) < 2:
        assert stage.poll() is None, stage.communicate()[1]
        time.sleep(0.01)


def facts(store: Path) -> dict:
    return json.loads((store / "tiny" / "joint" / "record.json").read_text())


@pytest.fixture
def begun(tiny_config, tmp_path):
    """Writes the config of a service, and copies the sealed prompts and cold start into a new store."""
    port = find_port()

    def write(**settings: object) -> Path:
        joint = yaml.safe_load(tiny_config().read_text())["joint"]
        rl = {
            "algorithm": "grpo",
            "weight": 1.0,
            "branches": 2,
            "states": 4,
            "normalise": True,
            "rewards": {"mine": 1.0},
        }
        return tiny_config(
            rewards={"mine": {"url": f"http://127.0.0.1:{port}", "timeout": 5.0, **settings}},
            joint={**joint, "updates": UPDATES, "rl": rl},
            evaluate={"metrics": ["mine"], "batch_size": 4, "models": ["student"]},
        )

    for stage in ("prompts", "cold_start"):  # which need no service
        seal_stage(load_config(write(wait=0.1)), tmp_path / "begun", stage)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "begun", tmp_path / name))

    (tmp_path / "mine.py").write_text(CODE)
    return write, copy, port, tmp_path / "mine.py"


@pytest.mark.process
def test_a_killed_service_costs_time_and_no_bit(begun):
    """Undisturbed; killed and started again in time; killed for too long (74, after a checkpoint), and repeated."""
    write, copy, port, file = begun
    service, config = serve(file, port), write(wait=60.0)
    whole, hurt = copy("whole"), copy("hurt")
    finish(command("joint", config, whole))

    stage = start(command("joint", config, hurt))
    wait_for_checkpoint(hurt, stage)
    end(service)
    time.sleep(0.3)
    service = serve(file, port)
    _, err = stage.communicate(timeout=120)
    assert stage.returncode == 0, err
    assert digests(hurt, "joint") == digests(whole, "joint"), "the pause changed nothing"
    assert facts(whole)["inputs"]["reward:mine"] == facts(hurt)["inputs"]["reward:mine"]

    late, config = copy("late"), write(wait=0.5)
    stage = start(command("joint", config, late))
    wait_for_checkpoint(late, stage)
    end(service)
    _, err = stage.communicate(timeout=120)
    assert stage.returncode == RewardUnavailable.exit_code == 74, err
    assert "the reward mine at" in err.splitlines()[-1] and "does not answer" in err.splitlines()[-1]
    assert "a fault of DMDR" not in err
    assert 2 <= last_step(late) < UPDATES

    service = serve(file, port)
    finish(command("joint", config, late))
    assert digests(late, "joint") == digests(whole, "joint")

    end(service)
    finish(command("joint", config, late))  # what is sealed needs no service
    file.write_text(CODE.replace('"1"', '"2"'))
    service = serve(file, port)
    other = finish(command("joint", config, late), code=64)  # sealed with another reward
    assert "reward:mine" in other
    end(service)
