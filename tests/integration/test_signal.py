"""`dmdr signal`: the cosine of each algorithm's gradient with the reward's, from a run that stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dmdr.config.load import load_config
from dmdr.rewards.lab import LabReward
from flows import cli
from tests.support.trained_run import seal_stage

pytestmark = pytest.mark.slow


@pytest.fixture
def started(tiny_config: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A config and the store that holds its prompts and cold start."""
    path, store = tiny_config(), tmp_path / "runs"
    for stage in ("prompts", "cold_start"):
        seal_stage(load_config(path), store, stage)
    return path, store


def read_table(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_refl_is_1_by_definition_and_the_run_stays(started, capsys):
    path, store = started
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert cli.main(["signal", str(path), "--store", str(store), "--updates", "2", "--fit", "3"]) == 0
    printed = capsys.readouterr().out
    table = read_table(printed)
    assert {"refl, as in the config", "refl", "grpo, branches", "grpo, whole images", "surrogate"} <= table.keys()
    drawn = [cell for cell in table["refl"][:-1] if cell != "-"]  # a batch of 2 need not have each step
    assert drawn and all(cell.startswith("+1.000") for cell in drawn)
    assert re.fullmatch(r"[+-]0\.\d{3} ± 0\.\d{3}", table["grpo, branches"][0]) and table["grpo, branches"][1] == "-"
    assert re.fullmatch(r"[+-]\d+\.\d\d", table["surrogate"][-2]) and table["refl"][-2] == "-"
    assert "explains after 3 updates" in printed
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


def test_a_reward_without_a_gradient_is_measured_by_halves(started, capsys, monkeypatch):
    monkeypatch.setattr(LabReward, "differentiable", False)
    path, store = started
    more = "joint.batch_size=4"  # two trajectories, one for each half
    grpo = "joint.rl={algorithm: grpo, weight: 1.0, branches: 3, states: 4, rewards: {lab-conv: 1.0}}"
    short = ["--updates", "2", "--fit", "2"]
    arguments = ["signal", str(path), "--store", str(store), *short, "--set", grpo, "--set", more]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    table = read_table(printed)
    assert "cosine with the other half of the batch" in printed and "refl" not in table
    assert re.match(r"[+-]\d\.\d{3}", table["grpo, as in the config"][0])


def test_a_weighting_has_no_row_and_is_told_so(started, capsys):
    path, store = started
    rl = "joint.rl={algorithm: weighting, weight: 1.0, rewards: {lab-conv: 1.0}}"
    capsys.readouterr()
    assert cli.main(["signal", str(path), "--store", str(store), "--updates", "1", "--fit", "1", "--set", rl]) == 0
    found = capsys.readouterr()
    assert "weighting has no row: it hands the student no gradient of its own" in found.out + found.err
    table = read_table(found.out)
    assert "refl" in table and not [label for label in table if "as in the config" in label]


def test_without_rl_there_is_nothing_to_measure(tiny_config, tmp_path, capsys):
    path = tiny_config()
    assert cli.main(["signal", str(path), "--store", str(tmp_path), "--set", "joint.rl=null"]) == 64
    assert "signal measures what RL learns from, and joint.rl is missing; set it" in capsys.readouterr().err
