"""The measurement of a GPU, tried on a CPU: every line runs, is written at once, and fails where it should."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dmdr.errors import ConfigError
from dmdr.planning.gpus import GPUS
from dmdr.planning.measure import correctness
from dmdr.planning.measure.__main__ import measure, run_section
from dmdr.planning.measure.cases import Shape, Stage, build_config
from dmdr.planning.measure.clock import Target
from dmdr.planning.measure.levers import LEVERS
from dmdr.planning.measure.table import Line, Table
from dmdr.planning.measure.tower import VisionTower
from dmdr.planning.measure.updates import SHAPES, compare_with_plan, find_gpu
from dmdr.planning.stage_plan import StagePlan
from dmdr.planning.structures import STRUCTURES
from dmdr.planning.work import Tally, Work

SMALL = Shape("SD3-Medium", 512, 2, True).shrink()


@pytest.mark.slow
def test_every_line_runs_on_a_cpu_and_is_written(tmp_path: Path) -> None:
    lines = measure(Target("cpu", tiny=True), tmp_path, minutes=60)
    found = {line.name for line in lines}
    assert not [line for line in lines if line.failed]
    assert {each.shrink().name for each in SHAPES} <= found
    assert {lever.name for lever in LEVERS} <= found
    assert {f"{name}, SD3-Medium 16 px" for name in STRUCTURES} <= found
    assert [name for name in found if name.startswith("profile")] and [name for name in found if "whole update" in name]
    unavailable = {line.name for line in lines if line.note}
    absent = {"attention by cuDNN", "attention by memory efficient", "attention by FlashAttention 3"}
    assert unavailable <= {*absent, "frozen base in nf4"}, "what a CPU, or this environment, does not have"
    assert (tmp_path / "measure.txt").read_text().splitlines() == [line.format() for line in lines]
    with (tmp_path / "measure.csv").open(newline="") as file:
        written = {(row["line"], row["figure"]) for row in csv.DictReader(file)}
    assert {(line.name, key) for line in lines for key in line.figures} <= written


def test_the_time_ends_a_section_after_a_line_and_leaves_out_the_rest(tmp_path: Path) -> None:
    def lines() -> Iterator[Line]:
        yield Line("first", {"s": 1.0})
        raise AssertionError("the time was over")

    table = Table(tmp_path)
    run_section("a section", lines(), table, end=time.monotonic() - 1)
    assert [line.name for line in table.lines] == ["first", "a section"]
    assert "left out" in (tmp_path / "measure.txt").read_text()
    assert [line.note != "" for line in measure(Target("cpu", tiny=True), tmp_path, minutes=0)] == [True] * 7


def test_an_error_ends_a_section_and_not_the_run(tmp_path: Path) -> None:
    def lines() -> Iterator[Line]:
        yield Line("first")
        raise torch.OutOfMemoryError("tried to allocate\nmuch")

    table = Table(tmp_path)
    run_section("a section", lines(), table, end=time.monotonic() + 60)
    assert table.lines[-1].failed and table.lines[-1].note == "OutOfMemoryError: tried to allocate"


def test_another_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes something else is noticed: here, a stage whose weights are others on the second time."""
    kinds = iter((0.02, 0.5))
    plain = correctness.Stage

    def build(shape: Shape, device: str) -> Stage:
        stage, spread = plain(shape, device), next(kinds)
        with torch.no_grad():
            for parameter in stage.base.fake_parameters.values():
                parameter.add_(spread * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
        return stage

    monkeypatch.setattr(correctness, "Stage", build)
    line = correctness.compare_with_cpu(SMALL, "cpu")
    assert line.failed and "FAILED" in line.format()


def test_a_tensor_that_differs_is_counted() -> None:
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert correctness.count_different(one, {name: value.clone() for name, value in one.items()}) == 0
    assert correctness.count_different(one, {"a": torch.ones(2), "b": torch.tensor([0.0, 1e-38])}) == 1


@pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.name)
def test_a_lever_leaves_no_trace(lever) -> None:
    """After its context the stage computes the same bits as before."""
    stage = Stage(SMALL, "cpu")
    stage.roll_out()
    for trainable in (stage.state.student, stage.state.fake_score):
        trainable.set_learning_rate(0.0)
    before = {name: float(value) for name, value in stage.update_student(rewarded=True).items()}
    try:
        with lever.apply(stage):
            pass
    except ConfigError as error:
        pytest.skip(str(error))  # this machine does not have it
    after = {name: float(value) for name, value in stage.update_student(rewarded=True).items()}
    assert after == before


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_what_is_planned_is_what_is_measured(shape: Shape) -> None:
    """Both configs of a shape differ in the rewards alone."""
    planned, measured = (build_config(shape, batch=8, published=published) for published in (True, False))
    same = {"joint": planned.joint, "rewards": planned.rewards}
    assert measured.model_copy(update=same) == planned
    assert len(planned.joint.rl.rewards) == len(measured.joint.rl.rewards)


def test_a_measured_update_stands_beside_its_plan() -> None:
    plan = StagePlan("joint", 2, 1, parts={"teacher": 3 * 2**30}, update=2**30, forward=1.0)
    plan.set_work("student", Tally({Work("product", "bfloat16", 10**15, 8): 1.0}, 1e15, 4e14))
    gpu = GPUS["h100-80"]
    found = compare_with_plan(plan, gpu, SHAPES[0], seconds=4.0, peak=8 * 2**30)
    assert (found["TFLOP executed"], found["TFLOP needed"]) == (1000, 600)
    assert found["executed"] == pytest.approx(1e15 / 4 / gpu.flops) and found["MFU"] == pytest.approx(
        0.6 * found["executed"]
    )
    assert (found["planned GiB"], found["planned / peak"]) == (4, 0.5)
    assert found["planned / s"] == pytest.approx(found["planned s"] / 4)
    assert "MFU" not in compare_with_plan(plan, None, SHAPES[0], seconds=4.0, peak=0)


def test_gpus_are_found_by_the_names_that_torch_gives_them() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100-80",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A10G": "a10g",
        "NVIDIA B200": "b200",
        "NVIDIA GeForce RTX 3090": "rtx-3090",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA GeForce RTX 5090": "rtx-5090",
    }
    assert {name: find_gpu(name) for name in names} == {name: GPUS[key] for name, key in names.items()}
    assert {*names.values()} == {*GPUS}
    assert find_gpu("Tesla V100") is None


def test_a_tower_has_the_size_of_the_one_that_is_trained_on() -> None:
    """ViT-H-14's image tower: 632 M parameters (OpenCLIP's table of models)."""
    with torch.device("meta"):
        tower = VisionTower()
        assert tower(torch.empty(2, 3, 224, 224)).shape == (2, 1024)
    assert sum(each.numel() for each in tower.parameters()) == pytest.approx(632e6, rel=0.001)
