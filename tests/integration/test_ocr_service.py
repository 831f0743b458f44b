"""A joint run that is rewarded for text, read by a service in another process, which is killed in the middle of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from dmdr.config.load import load_config
from dmdr.metrics.verifier import load_any_reward
from dmdr.rewards.sources import list_sources
from tests.integration.test_reward_service import end, facts, find_port, last_step, wait_for_checkpoint
from tests.support.stage_process import Process, command, start
from tests.support.trained_run import seal_stage

RECORDS = [{"prompt": 'a sign that says "OPEN"'}, {"prompt": 'a sign that says "MOON"'}]
RL = {"algorithm": "grpo", "weight": 1.0, "branches": 2, "states": 2, "rewards": {"reader": 1.0}}


def serve(port: int) -> Process:
    process = start(["flows.cli", "serve-reward", "ocr", "--port", str(port)])
    assert "digest" in process.stdout.readline(), process.communicate()[1]
    return process


def draw(text: str) -> torch.Tensor:
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).text((12, 42), text, fill="black", font=ImageFont.load_default(34))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def read(config: Path) -> list[float]:
    """What the service thinks of a drawn "OPEN" under each prompt, asked as a stage asks it."""
    reward = load_any_reward("reader", "cpu", list_sources(load_config(config)))
    return [float(reward(draw("OPEN"), [each["prompt"]], [each])) for each in RECORDS]


@pytest.mark.process
def test_a_run_waits_for_its_reader_and_ends_sealed(tiny_config, tmp_path):
    pytest.importorskip("rapidocr", reason="pip install 'dmdr[ocr]'")
    port, store = find_port(), tmp_path / "runs"
    joint = {"updates": 6, "batch_size": 2, "fake_updates": 2, "rl": RL}
    rates = {"student": {"learning_rate": 1e-4}, "fake_score": {"learning_rate": 2e-4}}
    config = tiny_config(
        rewards={"reader": {"url": f"http://127.0.0.1:{port}", "timeout": 60.0, "wait": 240.0}},
        joint={**joint, **rates},
        evaluate={"metrics": ["reader"], "batch_size": 4, "models": ["student"]},
        execution={"device": "cpu", "checkpoint_every": 1},
    )
    signs = [f'a sign that says "{word}"' for word in ("OPEN", "MOON", "TEA", "SALE", "Good day", "42")]
    (tmp_path / "train.txt").write_text("\n".join(signs) + "\n", encoding="utf-8")
    for stage in ("prompts", "cold_start"):  # which need no service
        seal_stage(load_config(config), store, stage)

    service = serve(port)
    before = read(config)
    assert before[0] == 1.0 and 0 < before[1] < 0.7
    stage = start(command("joint", config, store))
    wait_for_checkpoint(store, stage)
    end(service)
    met = last_step(store)
    time.sleep(1.0)
    service = serve(port)
    _, err = stage.communicate(timeout=600)
    assert stage.returncode == 0, err
    assert met < joint["updates"], "it was met in its middle"
    assert facts(store)["inputs"]["reward:reader"]
    rows = [json.loads(line) for line in (store / "tiny" / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [*range(joint["updates"])]
    assert all(0 <= row["reward/reader"] <= 1 for row in rows)
    assert read(config) == before, "the service that was started again reads alike"
    end(service)
