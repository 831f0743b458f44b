"""What a training stage left in its store, and whether two stages ended alike."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5
RUN = {"updates": 4, "batch_size": 3, "fake_updates": 3, "dynamic": {"updates": 3}}
RATES = {"student": {"learning_rate": 1e-4}, "fake_score": {"learning_rate": 1e-4}}
TRAINING = {**RUN, **RATES}


def results(store: Path, stage: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """All tensors that a stage sealed, and the rows of its metrics."""
    folder = store / "tiny" / stage
    weights = {
        f"{file.stem}/{name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
    }
    return weights, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours: Path, theirs: Path, stage: str) -> None:
    """Weights and logged figures, to TOLERANCE of their size."""
    (weights, rows), (expected, expected_rows) = results(ours, stage), results(theirs, stage)
    assert weights.keys() == expected.keys() and len(rows) == len(expected_rows)
    apart = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    figures = [(row[key], value) for row, each in zip(rows, expected_rows, strict=True) for key, value in each.items()]
    relative = max(abs(found - value) / max(1.0, abs(value)) for found, value in figures)
    print(f"{stage}: weights at most {apart:.2e} apart, figures {relative:.2e}")
    assert apart < TOLERANCE and relative < TOLERANCE


def digests(store: Path, stage: str) -> dict[str, str]:
    """The sha256 of each sealed file."""
    record = json.loads((store / "tiny" / stage / "record.json").read_text())
    return {name: facts["sha256"] for name, facts in record["files"].items()}


def steps_saved(store: Path, stage: str) -> set[str]:
    """The folders of the whole checkpoints."""
    return {path.parent.name for path in (store / "tiny" / stage / "checkpoints").glob("*/manifest.json")}
