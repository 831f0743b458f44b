"""Trackers get what a stage shows; what they lack is one line. TensorBoard's files are read back by its own reader."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stages.live import trackers
from stages.live.trackers import TrackedStage, Tracking

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
PROMPTS = ["a red circle", "two blue squares"]


def stage_at(folder: Path, step: int = 0) -> TrackedStage:
    return TrackedStage("tiny", "joint", "runs/tiny/joint", step, {"seed": 3}, folder)


def track(folder: Path, steps: range, *, resumed: int = 0, shift: float = 0.0) -> list[str]:
    """Log a stage that goes on after `resumed` updates; the lines that the user gets."""
    lines: list[str] = []
    tracking = Tracking(["tensorboard"], stage_at(folder, resumed), lines.append)
    for step in steps:
        tracking.log(
            step, {"update": step - 1, "loss_dm": step + shift, "reward/lab-conv": 0.5, "broken": float("nan")}
        )
    tracking.show(steps[-1], "student", IMAGES, PROMPTS)
    tracking.finish(is_finished=True)
    return lines


def test_tensorboards_own_reader_reads_each_update_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert track(tmp_path, range(1, 7)) == []
    assert track(tmp_path, range(5, 9), resumed=4, shift=0.25) == []
    found = reader.EventAccumulator(
        str(tmp_path / "tensorboard/tiny/joint"), size_guidance={reader.SCALARS: 0}
    ).Reload()
    scalars = [(event.step, event.value) for event in found.Scalars("loss_dm")]
    assert scalars == [(n, n) for n in range(1, 5)] + [(n, n + 0.25) for n in range(5, 9)], (
        "the killed attempt's 5, 6 are gone"
    )
    assert found.Tags()["scalars"] == ["loss_dm", "reward/lab-conv"]
    (*_, image) = found.Images("student")
    assert (image.width, image.height) == (32, 16)
    (settings,) = found.Tensors("settings/text_summary")
    assert b"runs/tiny/joint" in settings.tensor_proto.string_val[0]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_absent_is_one_line(name, tmp_path, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)  # so that importing it fails, as where it is not installed
    lines: list[str] = []
    tracking = Tracking([name], stage_at(tmp_path), lines.append)
    tracking.log(1, {"loss_dm": 1.0})
    tracking.finish(is_finished=False)
    assert lines == [
        f"tracker {name} is left out (its package is not installed here; pip install 'dmdr[{name}]' adds it); training "
        "goes on"
    ]


def test_a_tracker_that_fails_is_one_line_and_is_left_alone(tmp_path, monkeypatch):
    class Failing:
        tries = 0

        def __init__(self, stage: TrackedStage) -> None:
            pass

        def log(self, step: int, figures: dict[str, float]) -> None:
            Failing.tries += 1
            raise ConnectionError("the server\nis away; token hf_abcdefghijklmnopqrstuvwxyz")

        def finish(self, *, is_finished: bool) -> None:
            raise AssertionError("it was left alone")

    monkeypatch.setitem(trackers.KINDS, "mlflow", Failing)
    lines: list[str] = []
    tracking = Tracking(["mlflow"], stage_at(tmp_path), lines.append)
    for step in range(50):
        tracking.log(step, {"loss_dm": 1.0})
    tracking.finish(is_finished=True)
    assert lines == ["tracker mlflow is left out (the server is away; token ***); training goes on"]
    assert Failing.tries == 1
