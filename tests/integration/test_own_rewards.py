"""A run that trains on and reports a reward of the user's own: through all its stages, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError
from dmdr.rewards.identity import identify_reward
from dmdr.rewards.sources import RewardSources
from flows.commands.check import load_all_rewards
from stages.evaluate import find_by_digest
from stages.store.artifacts import Artifact
from stages.store.inputs import fingerprint_inputs
from stages.store.sealed_settings import rebuild_config
from tests.support.trained_run import run_stage

CODE = """class Marked:
    differentiable, version, range = True, "1", None
    def __init__(self, device): self.seen = 0
    def __call__(self, images, prompts, metadata):
        assert [each["mark"] for each in metadata] == [len(each["prompt"]) for each in metadata]
        self.seen += len(images)
        if self.seen > MOST:
            raise RuntimeError("tired")
        return images.mean((1, 2, 3))
"""


@pytest.fixture
def marked(tiny_config, tmp_path):
    """Writes the config of a run whose prompts carry a mark that its reward asks for."""

    def write(algorithm: str, most: int = 10**9, *, tilted: bool = False) -> Path:
        joint, cold_start = (yaml.safe_load(tiny_config().read_text())[stage] for stage in ("joint", "cold_start"))
        for name in ("train", "held-out"):
            lines = (tmp_path / f"{name}.txt").read_text().splitlines()
            rows = [json.dumps({"prompt": line, "mark": len(line)}) for line in lines]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        (tmp_path / "mine.py").write_text(CODE.replace("MOST", str(most)))
        group = {} if algorithm == "refl" else {"branches": 2, "states": 4}
        rl = {"algorithm": algorithm, "weight": 0.5, "rewards": {"mine": 1.0, "lab-conv": 0.5}, **group}
        return tiny_config(
            prompts={"sources": [str(tmp_path / "train.jsonl")], "evaluation": str(tmp_path / "held-out.jsonl")},
            rewards={"mine": {"file": f"{tmp_path / 'mine.py'}:Marked"}},
            **({"cold_start": {**cold_start, "rl": {**rl, "start": 1}}} if tilted else {}),
            joint={**joint, "rl": rl, "watch": {"reward": "lab-mixer", "every": 1, "prompts": 2}},
            evaluate={"metrics": ["mine", "lab-mixer"], "batch_size": 4, "models": ["student", "teacher"]},
        )

    return write


@pytest.mark.parametrize("algorithm", ["refl", "grpo"])
def test_metadata_reaches_it_in_training_and_in_evaluation(marked, tmp_path, algorithm):
    """The reward itself refuses an image whose prompt's metadata did not arrive."""
    config, store = load_config(marked(algorithm, tilted=True)), tmp_path / "store"
    assert load_all_rewards(config) == "lab-conv, lab-mixer, mine: loaded"
    for stage in config.stages:
        run_stage(config, store, stage)
    record = json.loads((store / "tiny" / "joint" / "record.json").read_text())
    assert record["inputs"]["reward:mine"] == fingerprint_inputs(config, "joint", str(store), "tiny")["reward:mine"]
    rows = [json.loads(line) for line in (store / "tiny" / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["reward/mine"] < 1 for row in rows if "reward/mine" in row) and "reward/mine" in rows[0]
    card = json.loads((store / "tiny" / "evaluate" / "scorecard.json").read_text())
    assert {row["name"]: row["trained_on"] for row in card["metrics"]} == {"mine": True, "lab-mixer": False}
    assert card["about"]["mine"]["model"] == "own reward mine.py:Marked" and str(tmp_path) not in json.dumps(card)
    records = {stage: Artifact(str(store), "tiny", stage).sealed() for stage in ("cold_start", "joint", "export")}
    again = rebuild_config(records, "tiny", config.teacher.path, ("pipeline",))
    assert again.joint.rl.rewards == config.joint.rl.rewards, "another export needs none of the code"
    assert again.cold_start.rl.rewards == config.cold_start.rl.rewards
    rows = [json.loads(line) for line in (store / "tiny" / "cold_start" / "metrics.jsonl").read_text().splitlines()]
    assert ["reward/mine" in row for row in rows] == [False, True], "RL acts from update 1 on"
    assert records["cold_start"].inputs["reward:mine"] == record["inputs"]["reward:mine"]
    (tmp_path / "mine.py").write_text(CODE.replace("MOST", "7"))
    with pytest.raises(ConfigError, match="reward:mine"):
        run_stage(config, store, "joint")


def test_code_that_fails_in_the_middle_is_one_line(marked, tmp_path):
    config, store = load_config(marked("grpo", most=6)), tmp_path / "store"
    for stage in ("prompts", "cold_start"):
        run_stage(config, store, stage)
    with pytest.raises(DataError, match=r"the reward mine .* raised RuntimeError: tired \(mine.py, line 8\)"):
        run_stage(config, store, "joint")


def test_a_reward_of_ours_is_marked_whatever_process_computed_it(tiny_config):
    """By its digest: lab-mixer, served under another name, is trained on; lab-conv beside it is not."""
    own = {"judge": {"url": "http://127.0.0.1:9"}}
    joint = yaml.safe_load(tiny_config().read_text())["joint"]
    rl = {"algorithm": "grpo", "weight": 1.0, "branches": 2, "states": 4, "rewards": {"judge": 1.0}}
    config = load_config(
        tiny_config(rewards=own, joint={**joint, "rl": rl}, evaluate={"metrics": ["lab-mixer", "lab-conv"]})
    )
    digest = identify_reward("lab-mixer", RewardSources()).digest
    assert find_by_digest({digest, "0" * 64}, config) == ["lab-mixer"]
    assert find_by_digest(set(), config) == []
