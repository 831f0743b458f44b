"""Configs of whole runs that take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dmdr.lab.prompts import lab_prompts

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "a red circle",
    "two blue squares",
    "a green triangle left of a yellow star",
    "three white rings",
    "a purple cross",
    "a photo of an apple",
    "an oil painting of a lighthouse",
    "a cat that wears a hat",
    "a yellow bicycle",
    "four pink hearts",
    "a bowl of soup",
    "a robot reading a book",
    "the sea at night",
    "a blue square above a red circle",
    "one orange diamond",
    "a map of an island",
    "snow on a pine tree",
    "a teapot made of glass",
    "five grey dots",
    "a portrait of an owl",
)


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_sd3_folder: Path) -> Callable[..., Path]:
    """Writes a config of a whole tiny run and returns its path; keywords replace top-level keys."""

    def write(**changes: object) -> Path:
        (tmp_path / "train.txt").write_text("\n".join(PROMPTS[:14]) + "\n", encoding="utf-8")
        (tmp_path / "held-out.txt").write_text("\n".join(PROMPTS[14:]) + "\n", encoding="utf-8")
        execution = changes.get("execution", {})
        training = {
            "updates": 2,
            "batch_size": 2 * execution.get("processes", 1),  # each rank needs a prompt
            "fake_updates": 2,
            "student": {"learning_rate": 1e-4},
            "fake_score": {"learning_rate": 2e-4},
        }
        config = {
            "run": "tiny",
            "seed": 3,
            "teacher": {"path": str(tiny_sd3_folder), "guidance_scale": 3.0, "steps": 3},
            "prompts": {"sources": [str(tmp_path / "train.txt")], "evaluation": str(tmp_path / "held-out.txt")},
            "student": {"steps": 2},
            "fake_score": {"lora_rank": 4},
            "cold_start": {**training, "dynamic": {"updates": 2}},
            "joint": {**training, "rl": {"algorithm": "refl", "weight": 0.5, "rewards": {"lab-conv": 1.0}}},
            "evaluate": {"metrics": ["lab-mixer"], "batch_size": 4},
            "execution": {"device": "cpu", "checkpoint_every": 1},
            **changes,
        }
        # random teachers draw no world; the tests say that they draw one, to train on the lab's small rewards
        config["teacher"] = {"world": "shapes", **config["teacher"]}
        config["execution"] = {"live": None, **config["execution"]}  # tests of what shows while it trains turn it on
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def short_lab_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes configs/lab-flow.yaml with few prompts in several shards, few updates, small batches and few images;
    keywords replace top-level keys."""

    def write(**changes: object) -> Path:
        few_prompts = {name: tmp_path / f"lab-{name}.jsonl" for name in ("train", "held-out")}
        for name, file in few_prompts.items():
            file.write_text("\n".join(map(json.dumps, lab_prompts(name)[:60])), encoding="utf-8")
        config = yaml.safe_load((ROOT / "configs/lab-flow.yaml").read_text(encoding="utf-8"))
        sources = {"sources": [str(few_prompts["train"])], "evaluation": str(few_prompts["held-out"])}
        config["prompts"] = {**sources, "shard_size": 16}
        few = {"updates": 2, "batch_size": 4, "fake_updates": 2}
        config["cold_start"] |= few | {"dynamic": config["cold_start"]["dynamic"] | {"updates": 2}}
        config["joint"] |= few | {"watch": config["joint"]["watch"] | {"prompts": 4}}
        config["evaluate"] |= {"limit": 8, "batch_size": 8}
        config["execution"] |= {"device": "cpu", "checkpoint_every": 1, "live": None}
        path = tmp_path / "short-lab.yaml"
        path.write_text(yaml.safe_dump(config | changes, sort_keys=False), encoding="utf-8")
        return path

    return write
