"""The mixture of rewards: what is known of a prompt reaches each, and normalisation makes their weights comparable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmdr.config.own_rewards import OwnReward
from dmdr.config.training import GRPO as GRPOConfig
from dmdr.errors import ConfigError, DataError, NonFinite
from dmdr.noise import noise_for
from dmdr.rewards.sources import RewardSources
from dmdr.rl.mixture import WINDOW, Mixture
from tests.support.tiny_teachers import copy_teacher

CODE = """
import torch

class R:
    differentiable, version, range = False, '1', None
    def __init__(self, device): pass
    def __call__(self, images, prompts, metadata):
        return BODY
"""
RECORDS = [{"prompt": f"prompt {n}", "mark": n} for n in range(4)]


def make(tiny_sd3_folder: Path, folder: Path, bodies: dict[str, str], **settings: object) -> Mixture:
    """A mixture of one's own rewards: name -> what it returns."""
    own = {}
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(CODE.replace("BODY", body), encoding="utf-8")
        own[name] = OwnReward(file=f"{folder / name}.py:R")
    settings = {"rewards": dict.fromkeys(bodies, 1.0), **settings}
    config = GRPOConfig(algorithm="grpo", weight=1.0, **settings)
    return Mixture(config, copy_teacher(tiny_sd3_folder), differentiable=False, weights=RewardSources(own=own))


def test_metadata_reaches_the_reward_of_each_sample(tiny_sd3_folder, tmp_path):
    mixture = make(tiny_sd3_folder, tmp_path, {"mine": "torch.tensor([float(each['mark']) for each in metadata])"})
    x0 = noise_for(1, "x0", shape=(4, *mixture.backbone.latent_shape))
    assert mixture.score_samples(x0, RECORDS, 3)["mine"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_plan_scores_samples_without_numbers_by_a_reward_that_checks():
    """On the device "meta", where nothing can be compared."""
    backbone = SimpleNamespace(network=SimpleNamespace(device=torch.device("meta")), decode=lambda x0: x0[:, :3])
    config = GRPOConfig(algorithm="grpo", weight=1.0, rewards={"lab-checker": 1.0})
    mixture = Mixture(config, backbone, differentiable=False)
    found = mixture.score_samples(torch.empty(4, 4, 8, 8, device="meta"), RECORDS, 3)["lab-checker"]
    assert found.shape == (4,) and found.device.type == "meta"


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("images.mean((1, 2, 3)) * float('nan')", NonFinite, "not a number"),
        ("torch.tensor([float(each['absent']) for each in metadata])", DataError, "KeyError: 'absent'"),
        ("images[1:].mean((1, 2, 3))", DataError, r"\(2,\) for 3 images"),
    ],
)
def test_a_reward_is_tried_on_training_prompts_before_the_first_update(tiny_sd3_folder, tmp_path, body, error, message):
    mixture = make(tiny_sd3_folder, tmp_path, {"mine": body})
    with pytest.raises(error, match=message):
        mixture.probe(RECORDS[:3])


def test_normalised_rewards_have_one_deviation_whatever_their_unit(tiny_sd3_folder, tmp_path):
    """The same scores in units 1000 times apart weigh the same; without normalisation the larger unit decides."""
    bodies = {"small": "images.mean((1, 2, 3))", "large": "images.mean((1, 2, 3))"}
    scores = torch.rand(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    both = {"small": scores, "large": 1000 * scores.flip(0) + 5}
    plain = make(tiny_sd3_folder, tmp_path, bodies)
    assert torch.equal(plain.mix(both), both["small"] + both["large"]) and not plain.list_moments(both)
    normal = make(tiny_sd3_folder, tmp_path, bodies, normalise=True)
    each = (scores - scores.mean()) / scores.std(correction=0)
    assert torch.allclose(normal.mix(both), each + each.flip(0), atol=1e-9)
    moments = normal.list_moments(both)
    assert float(moments["normal_std/large"]) == pytest.approx(1000 * float(moments["normal_std/small"]), rel=1e-5)
    assert normal.mix({"small": torch.ones(4), "large": torch.ones(4)}).tolist() == [0, 0, 0, 0], "none differs"


def test_moments_are_those_of_all_samples_of_the_window(tiny_sd3_folder, tmp_path):
    """The rows hold mean and deviation of each update; together they give those of all samples, as if pooled. What a
    resumed run has is the rows."""
    mixture = make(tiny_sd3_folder, tmp_path, {"mine": "images.mean((1, 2, 3))"}, normalise=True)
    updates = torch.randn(WINDOW + 7, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64).cumsum(0)
    rows = [
        {"update": n, "reward/mine": float(x.mean()), "reward_std/mine": float(x.std(correction=0))}
        for n, x in enumerate(updates)
    ]
    mixture.remember([{"update": -1, "loss_fake": 1.0}, *rows[:-1]])
    pooled = updates[-WINDOW - 1 :].flatten()
    mean, std = mixture.measure("mine", updates[-1])
    assert (mean, std) == pytest.approx((float(pooled.mean()), float(pooled.std(correction=0))), rel=1e-9)


def test_verifiers_refuse_what_they_cannot_judge(tiny_sd3_folder, tmp_path):
    config = GRPOConfig(algorithm="grpo", weight=1.0, rewards={"lab-checker-soft": 1.0})
    mixture = Mixture(config, copy_teacher(tiny_sd3_folder), differentiable=False)
    with pytest.raises(ConfigError, match="cannot judge an image of 'prompt 0', which has no metadata"):
        mixture.probe(RECORDS[:1])
