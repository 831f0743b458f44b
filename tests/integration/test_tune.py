"""`dmdr tune`: short runs from one start, each done once, judged by a rule, and the run left as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dmdr.config.load import load_config
from flows import cli
from tests.support.trained_run import seal_stage

GRID = ("--grid", "student=1e-4,1e3", "--grid", "fake=2e-4", "--updates", "2")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_grid_is_run_once_and_the_run_stays(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    path, store, out = tiny_config(), tmp_path / "runs", tmp_path / "out"
    for stage in ("prompts", "cold_start"):
        seal_stage(load_config(path), store, stage)
    before = files_of(store)
    capsys.readouterr()

    def tune(*more: str) -> str:
        assert cli.main(["tune", str(path), "--store", str(store), "--out", str(out), *GRID, *more]) == 0
        printed = capsys.readouterr()
        return printed.err + printed.out

    said = tune()
    assert "3 of 3 cells to run, 2 updates each: about" in said
    assert files_of(store) == before
    result = json.loads((out / "tune.json").read_text())
    assert [cell["cell"]["seed"] for cell in result["cells"]] == [3, 4, 3]
    own, _, fast = result["cells"]
    assert own["look"] is not None and own["look"]["loss_fake"] > 0
    assert fast["unstable"]
    assert result["recommended"] == own["cell"]
    assert "student: {learning_rate: 0.0001}" in said
    with Image.open(out / "map.png") as picture:
        assert picture.width > 200

    cells = sorted((out / "cells").iterdir())
    times = [cell.stat().st_mtime_ns for cell in cells]
    assert "cells to run" not in tune()
    cells[0].unlink()  # as if it had been killed in the middle
    assert "1 of 3 cells to run" in tune()
    assert [cell.stat().st_mtime_ns for cell in cells[1:]] == times[1:]
    assert json.loads((out / "tune.json").read_text())["recommended"] == result["recommended"]

    assert cli.main(["tune", str(path), "--store", str(store), "--out", str(out), *GRID[:-1], "1"]) == 64
    assert "holds the cells of another tune: updates is 2 there, 1 here" in capsys.readouterr().err


def test_the_same_cell_gives_the_same_numbers_whatever_ran_before(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    path, store = tiny_config(student={"steps": 2, "form": "lora", "lora_rank": 4}), tmp_path / "runs"
    seal_stage(load_config(path), store, "prompts")
    looks = []
    for out, rates in ((tmp_path / "one", "3e-3,1e-4"), (tmp_path / "two", "1e-4")):
        where = ("--stage", "cold_start", "--store", str(store), "--out", str(out), "--updates", "1")
        assert cli.main(["tune", str(path), *where, "--grid", f"student={rates}", "--grid", "fake=2e-4"]) == 0
        (file,) = (out / "cells").glob("student-0.0001-fake-0.0002-ratio-2-seed-3.json")
        looks.append(json.loads(file.read_text())["look"])
    assert looks[0] == looks[1]


def test_what_cannot_be_tuned_is_one_line(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tiny_config()

    def refused(code: int, words: str, *arguments: str) -> None:
        assert cli.main(["tune", str(path), "--store", str(tmp_path / "runs"), *arguments]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error

    refused(66, "it needs prompts, which is not sealed")
    refused(64, "--grid student=1e-4,fast is no list of numbers", "--grid", "student=1e-4,fast")
    refused(64, "--grid ratio=2.5 is no list of whole numbers", "--grid", "ratio=2.5")
    refused(64, "--grid ratio=0 has a value that is not above 0", "--grid", "ratio=0")
    refused(64, "--grid rate=1 is not one of student=R,R", "--grid", "rate=1")
    refused(64, "tune judges by a reward that training does not use", "--set", "evaluate.metrics=[lab-conv]")
