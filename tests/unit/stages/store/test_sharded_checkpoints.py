"""Checkpoints whose rows lie in a file for each rank."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stages.store.artifacts import Artifact
from stages.store.checkpoints import Joined
from tests.support.store_bench import IDENTITY, INPUTS


def test_rows_of_many_files_are_one_tensor():
    value = torch.arange(10.0).view(5, 2)
    joined = Joined([{"x": value[:3], "step": torch.tensor(7)}, {"x": value[3:]}])
    assert list(joined) == ["x", "step"] and len(joined) == 2 and "y" not in joined
    assert torch.equal(joined["x"], value) and joined["step"] == 7


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_damage_in_the_rows_of_one_rank_is_found(tmp_path, capsys, damage):
    artifact = Artifact(str(tmp_path), "r", "joint")
    artifact.claim(IDENTITY, INPUTS)
    checkpoints, root = artifact.checkpoints(2), tmp_path / "r/joint"
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"step": step})
        folder = root / f"checkpoints/step-{step:08d}"
        shutil.copyfile(folder / "state.safetensors", folder / "state.1.safetensors")  # as a second rank's
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.1.safetensors"] = manifest["files"]["state.safetensors"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints.newest()[1]["x"].tolist() == [2, 2, 2, 2]
    rows = root / "checkpoints/step-00000002/state.1.safetensors"
    if damage == "flip":
        data = bytearray(rows.read_bytes())
        data[-1] ^= 1
        rows.write_bytes(data)
    else:
        rows.unlink()
    step, tensors, info = checkpoints.newest()
    assert (step, info, tensors["x"].tolist()) == (1, {"step": 1}, [1, 1, 1, 1])
    assert "state.1.safetensors" in capsys.readouterr().err
