"""Two ranks whose threads write checkpoints while their main threads sum: one is whole for both, or for none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stages.store.artifacts import Artifact

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]


def test_a_checkpoint_that_one_rank_cannot_write_is_none(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.ranked_checkpoints", str(tmp_path)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]

    own = "no space is left"
    of_other = "checkpoint {}/r/joint/checkpoints/step-{:08d} lacks the part of another rank"
    assert [line == "whole" for line in said[0]] == [True, False, True, False, True]
    assert said[0][0::2] == said[1][0::2] == ["whole"] * 3
    assert said[0][1].startswith(of_other.format(tmp_path, 2)) and said[1][1] == own
    assert said[0][3] == own and said[1][3].startswith(of_other.format(tmp_path, 4))
    checkpoints = Artifact(str(tmp_path), "r", "joint").checkpoints(4)
    for step in (1, 3, 5):
        assert checkpoints.load(step).tensors["rows"].tolist() == [10.0 * step] * 2 + [10.0 * step + 1] * 2
    whole = sorted(path.parent.name for path in tmp_path.glob("r/joint/checkpoints/*/manifest.json"))
    assert whole == [f"step-{step:08d}" for step in (1, 3, 5)]
