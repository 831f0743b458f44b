"""The same update by 1, 2 and 4 ranks over gloo: the same gradients and figures, whatever RL beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.ranked_updates import CASES
from tests.support.stage_process import ROOT

pytestmark = pytest.mark.process
TOLERANCE = 1e-6


def test_gradients_do_not_depend_on_the_number_of_ranks(tiny_sd3_folder, tmp_path):
    """In float64, of batches that the ranks share evenly and unevenly, whole and in parts."""
    command = [sys.executable, "-m", "tests.support.ranked_updates", str(tiny_sd3_folder), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found = {ranks: json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2, 4)}
    for case in CASES:
        alone = found[1][case]
        assert len(alone) > 20
        largest = max(abs(value) for name, values in alone.items() if "lora" in name for value in values)
        assert largest > 1e-5, "gradients too small to tell"
        for ranks in (2, 4):
            ours = found[ranks][case]
            assert ours.keys() == alone.keys(), case
            for name, values in alone.items():
                size = largest if "lora" in name else max(1.0, *map(abs, values))
                apart = max(abs(one - other) for one, other in zip(ours[name], values, strict=True))
                assert apart < TOLERANCE * size, (case, ranks, name, apart, size)
