"""A reward of the user's own: how a config names it, what its code may do wrong, and what the test kit finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dmdr.config.identity import identity
from dmdr.config.load import load_config
from dmdr.config.own_rewards import OwnReward
from dmdr.errors import ConfigError, DataError, InputMissing, NonFinite
from dmdr.rewards.identity import digest_rewards, identify_reward
from dmdr.rewards.kit import RewardKit
from dmdr.rewards.load import load_reward
from dmdr.rewards.own import UserReward
from dmdr.rewards.sources import RewardSources
from flows.cli import main
from stages.store.inputs import fingerprint_inputs

HEAD = """import torch

class R:
    differentiable, version, range = True, '1', (0.0, 1.0)
    def __init__(self, device): pass
"""
CALL = "    def __call__(self, images, prompts, metadata):\n        "
RL = {"algorithm": "grpo", "weight": 1.0, "branches": 2}
RECORDS = [{"prompt": "a red circle", "mark": 3}, {"prompt": "two blue squares", "mark": 4}]


def write(folder: Path, body: str, head: str = HEAD) -> OwnReward:
    (folder / "mine.py").write_text(f"{head}{CALL}{body}\n", encoding="utf-8")
    return OwnReward(file=f"{folder / 'mine.py'}:R")


def config_with(tiny_config, rewards: dict, *, rl: dict | None = None, **changes: object) -> Path:
    training = yaml.safe_load(tiny_config().read_text())["joint"]
    return tiny_config(rewards=rewards, joint={**training, "rl": rl or {**RL, "rewards": {"mine": 1.0}}}, **changes)


def test_the_template_passes_its_own_kit(capsys, tmp_path):
    assert main(["init", "reward"]) == 0
    (tmp_path / "mine.py").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["check-reward", f"{tmp_path / 'mine.py'}:Sharpness"]) == 0
    told = capsys.readouterr().out
    assert told.count("ok ") == len(told.splitlines()) == 9, told


@pytest.mark.parametrize(
    ("body", "check", "message"),
    [
        ("return images.mean((2, 3))", "shapes", r"gives \(1, 3\) for 1 images"),
        ("return images.mean()", "shapes", r"gives \(\) for 1"),
        ("return 0.5", "shapes", "gives float, not a tensor"),
        ("return images.mean((1, 2, 3)) / images.std((1, 2, 3)).round(decimals=6).sign()", "numbers", "not a number"),
        ("return 9 * images.mean((1, 2, 3))", "range", "outside of its range 0 to 1"),
        ("return images.mean((1, 2, 3)) + torch.rand(len(images))", "repeat", "scored twice differ"),
        ("return images.mean((1, 2, 3)) - images.mean()", "batch", "with the other images"),
        ("return images.mul_(0.5).mean((1, 2, 3))", "inputs", "changes the images"),
        ("return images.detach().mean((1, 2, 3))", "gradient", "no gradient reaches"),
        ("return (images + images.detach()).mean((1, 2, 3)) / 2", "gradient", "not the slope"),
        ("return (0 * images).mean((1, 2, 3))", "gradient", "0 everywhere"),
    ],
)
def test_the_kit_finds_the_broken_promise(tmp_path, body, check, message):
    """Each broken reward fails the check of its fault."""
    reward = UserReward("mine", write(tmp_path, body), "cpu")
    checks = RewardKit(reward, RECORDS, (16, 16), "cpu", reward.range).list_checks()
    with pytest.raises((DataError, NonFinite), match=message):
        checks[check]()


@pytest.mark.parametrize("body", ["return images.mean((1, 2, 3))", "return (images ** 2).mean((1, 2, 3)).sqrt()"])
def test_the_kit_passes_what_is_right(tmp_path, body):
    reward = UserReward("mine", write(tmp_path, body), "cpu")
    kit = RewardKit(reward, RECORDS, (16, 16), "cpu", reward.range)
    assert all(check() for check in kit.list_checks().values())


def test_prompts_and_what_is_known_of_them_reach_the_code(tmp_path):
    body = "return torch.tensor([float(len(p) + 100 * m['mark']) for p, m in zip(prompts, metadata)])"
    reward = load_reward("mine", "cpu", RewardSources(own={"mine": write(tmp_path, body)}))
    assert reward(torch.zeros(2, 3, 8, 8), ["ab", "abc"], RECORDS).tolist() == [302.0, 403.0]


@pytest.mark.parametrize(
    ("head", "body", "error", "message"),
    [
        (HEAD, "raise KeyError('x')", DataError, r"the reward mine .* raised KeyError: 'x' \(mine.py, line 7\)"),
        (HEAD, "return images.mean((1, 2, 3)) * float('nan')", NonFinite, "gives 2 of 2 images"),
        (HEAD, "return images[:1].mean((1, 2, 3))", DataError, r"gives \(1,\) for 2 images"),
        (HEAD.replace("True, '1'", "'yes', '1'"), "pass", DataError, "has 'yes' as its `differentiable`"),
        (HEAD.replace(", range = True, '1', (0.0, 1.0)", " = True, '1'"), "pass", DataError, "lacks its `range`"),
        (HEAD.replace("(0.0, 1.0)", "(1, 0)"), "pass", DataError, r"the lowest first"),
        ("import nothing_like_it\n" + HEAD, "pass", DataError, "raised ModuleNotFoundError"),
        (HEAD.replace("class R", "class Q"), "pass", DataError, "has no R; name a class"),
        (HEAD.replace("device): pass", "device): raise OSError('weights are away')"), "pass", DataError, "are away"),
    ],
)
def test_wrong_code_is_one_line(tmp_path, head, body, error, message):
    own = write(tmp_path, body, head)
    with pytest.raises(error, match=message) as raised:
        UserReward("mine", own, "cpu")(torch.zeros(2, 3, 8, 8), ["a", "b"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rewards", "rl", "message"),
    [
        ({"mine": {}}, {}, "has no place; give one of file, entry_point, url"),
        ({"mine": {"file": "a.py:A", "url": "http://h"}}, {}, "has file and url"),
        ({"mine": {"file": "a.py"}}, {}, "is not FILE.py:CLASS"),
        ({"mine": {"file": "s3://b/a.py:A"}}, {}, "is not on this machine"),
        ({"mine": {"file": "a.py:A", "timeout": 3.0}}, {}, "timeout is set but only a reward with a url"),
        ({"mine": {"url": "ftp://h"}}, {}, "is no address of a service"),
        ({"mine": {"url": "http://h:99999"}}, {}, "is no address of a service"),
        ({"mine": {"url": "http://me:secret@h:80"}}, {}, "holds credentials"),
        ({"pickscore": {"file": "a.py:A"}}, {"rewards": {"pickscore": 1.0}}, "has the name of a reward or metric"),
        ({"Mine.2": {"file": "a.py:A"}}, {}, "should match pattern"),
        ({"mine": {"file": "a.py:A"}}, {"rewards": {"ocr": 1.0}}, "rewards.mine is set but nothing names it"),
        ({}, {}, "unknown reward mine; .*rewards.mine"),
        (
            {"mine": {"url": "http://h"}},
            {"algorithm": "refl", "branches": ...},
            "refl needs a gradient, and",
        ),
        ({}, {"algorithm": "refl", "branches": ..., "rewards": {"ocr": 1.0}}, "needs a gradient, and the reward ocr"),
        ({"mine": {"file": "a.py:A"}}, {"normalise": True, "scales": {"mine": 2.0}}, "would do nothing"),
        ({"mine": {"file": "a.py:A"}}, {"algorithm": "refl", "branches": ..., "normalise": True}, "refl follows"),
        ({}, {"rewards": {"geneval": 1.0}, "prefixes": {"geneval": "Photo"}}, "does not read the prompt"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_config, rewards, rl, message):
    settings = {**RL, "rewards": {"mine": 1.0}, **rl}
    path = config_with(tiny_config, rewards, rl={key: value for key, value in settings.items() if value is not ...})
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert "\n" not in str(raised.value)


def test_the_file_is_part_of_what_names_a_result_and_its_place_is_not(tiny_config, tmp_path):
    own = write(tmp_path, "return images.mean((1, 2, 3))")
    config = load_config(config_with(tiny_config, {"mine": {"file": own.file}}))
    assert identity(config, "joint")["joint.rl.rewards.mine"] == 1.0
    assert not any(key.startswith("rewards") for stage in config.stages for key in identity(config, stage))
    before = digest_rewards(["mine"], RewardSources(own=config.rewards), waits=False)
    (tmp_path / "mine.py").write_text("# another\n")
    assert digest_rewards(["mine"], RewardSources(own=config.rewards), waits=False) != before
    (tmp_path / "mine.py").unlink()
    with pytest.raises(InputMissing, match="is not a file here"):
        fingerprint_inputs(config.model_copy(update={"cold_start": None}), "joint", str(tmp_path), "tiny")


def test_a_pod_finds_only_an_absolute_path(tiny_config):
    cluster = {"image": f"dmdr@sha256:{'0' * 64}"}
    for file, is_found in (("mine.py:R", False), ("/models/mine.py:R", True)):
        path = config_with(tiny_config, {"mine": {"file": file}}, execution={"cluster": cluster})
        if is_found:
            load_config(path)
        else:
            with pytest.raises(ConfigError, match="is relative, and a pod .*dmdr serve-reward mine.py:R"):
                load_config(path)


def test_an_entry_point_is_found_by_name(tmp_path, monkeypatch):
    """An installed package: its code, and the metadata that names it."""
    write(tmp_path, "return images.mean((1, 2, 3))")
    about = tmp_path / "mine-2.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 2.0\n")
    (about / "entry_points.txt").write_text("[dmdr.rewards]\nbrightness = mine:R\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = RewardSources(own={"b": OwnReward(entry_point="brightness"), "none": OwnReward(entry_point="darkness")})
    assert load_reward("b", "cpu", sources)(torch.full((2, 3, 4, 4), 0.25), ["", ""]).tolist() == [0.25, 0.25]
    first = identify_reward("b", sources).digest
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 2.1\n")
    assert identify_reward("b", sources).digest != first
    with pytest.raises(InputMissing, match="no installed package has it .* which has brightness"):
        load_reward("none", "cpu", sources)


def test_ours_are_named_by_their_weights(tiny_open_clip):
    one, two = (str(tiny_open_clip(seed, f"clip{seed}")[0]) for seed in (0, 1))
    digests = [identify_reward("dfn-clip", RewardSources({"dfn-clip": each})).digest for each in (one, two)]
    lab = [identify_reward(name, RewardSources()).digest for name in ("lab-conv", "lab-mixer")]
    assert len({*digests, *lab}) == 4
