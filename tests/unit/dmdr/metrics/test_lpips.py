"""LPIPS diversity beside the lpips package called directly, on the same random VGG-16."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision

from dmdr.config.load import load_config
from dmdr.errors import ConfigError, DataError
from dmdr.metrics.lpips import LPIPS
from stages.evaluation.samples import unpack
from tests.support.trained_run import run_stage, seal_stage, trained_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """What torchvision publishes, with random weights; its classifier, which LPIPS has no use for, is left out."""
    torch.manual_seed(0)
    found = torchvision.models.vgg16(weights=None).state_dict()
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({name: value for name, value in found.items() if name.startswith("features.")}, path)
    return path


def test_it_is_the_packages_mean_over_pairs(backbone):
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = torch.load(backbone)
    for number in range(1, 6):
        part = getattr(theirs.net, f"slice{number}")
        part.load_state_dict({name: weights[f"features.{name}"] for name in part.state_dict()})
    images = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = LPIPS(backbone, "cpu", side=64)(images)
    for of_prompt, mean in zip(images, found, strict=True):
        with torch.no_grad():
            pairs = [theirs(a[None] * 2 - 1, b[None] * 2 - 1).item() for a, b in itertools.combinations(of_prompt, 2)]
        assert mean == pytest.approx(np.mean(pairs), rel=1e-5)


def test_equal_images_have_none_and_broken_ones_no_number(backbone):
    image = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = torch.cat([image.expand(1, 2, -1, -1, -1)] * 2).clone()
    images[1, 1, 0, 0, 0] = torch.inf
    same, broken = LPIPS(backbone, "cpu", side=64)(images)
    assert same == pytest.approx(0, abs=1e-7) and np.isnan(broken)


def test_another_networks_weights_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "alexnet.pth")
    with pytest.raises(
        DataError, match=r"alexnet\.pth lacks VGG-16's features\.\d+\.(weight|bias); give torchvision's"
    ):
        LPIPS(tmp_path / "alexnet.pth", "cpu")


def test_one_image_a_prompt_has_no_pairs(tiny_config):
    with pytest.raises(ConfigError, match="lpips, a distance between images of one prompt, but seeds is 1"):
        load_config(tiny_config(evaluate={"metrics": ["lab-mixer", "lpips"]}))
    with pytest.raises(ConfigError, match="has only lpips, which measures diversity"):
        load_config(tiny_config(evaluate={"metrics": ["lpips"], "seeds": 4}))


def test_it_stands_on_the_card(backbone, tiny_config, tmp_path):
    settings = {"metrics": ["lab-mixer", "lpips"], "models": ["student"], "seeds": 2, "limit": 1}
    config = load_config(tiny_config(evaluate=settings, weights={"lpips-vgg16": str(backbone)}))
    store = trained_run(config, tmp_path / "store")
    seal_stage(config, store, "export")
    folder = run_stage(config, store, "evaluate")
    card = json.loads((folder / "scorecard.json").read_text())
    (found,) = [each["mean"] for each in card["metrics"] if each["name"] == "diversity/lpips-vgg16"]
    (drawn,) = unpack(folder / "samples" / "student-00000.tar")
    assert found == pytest.approx(LPIPS(backbone, "cpu")(drawn.tensor()[None])[0], rel=1e-5)
    assert "lpips-vgg16" in (folder / "report.html").read_text()
