"""How far it is from a container's command to the optimizer: the frames of ours on the stack, counted at run time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from tests.support.trained_run import seal_stage

ROOT = Path(__file__).parents[2]
MOST = 6  # __main__'s main, the stage, train, training_step, update_student, step
STAGE = """
import json, runpy, sys, traceback
import torch

def step(self, *_):
    stack = traceback.extract_stack()
    print(json.dumps([(frame.filename, frame.name) for frame in stack]))
    sys.stdout.flush()
    sys.exit()

torch.optim.AdamW.step = step
runpy.run_module("stages", run_name="__main__", alter_sys=True)
"""


@pytest.mark.process
def test_from_the_command_to_the_optimizer_in_six_frames(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_config()
    for stage in ("prompts", "cold_start"):
        seal_stage(load_config(path), tmp_path / "store", stage)
    command = [sys.executable, "-c", STAGE, "joint", "--config", str(path), "--store", str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stack = json.loads(done.stdout.strip().splitlines()[-1])
    ours = [(Path(file), name) for file, name in stack if Path(file).is_relative_to(ROOT) and ".venv" not in file]
    frames = [f"{file.relative_to(ROOT)}: {name}" for file, name in ours if name != "<module>"]
    print("\n".join(frames))
    assert frames[0] == "stages/__main__.py: main"
    assert len(frames) <= MOST, frames
