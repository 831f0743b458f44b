"""The real networks, without their weights, against what was published of them and against arithmetic."""

from __future__ import annotations

import pytest

from dmdr.planning.architectures import ARCHITECTURES

PUBLISHED = {"SDXL": 2.567, "SD3-Medium": 2.03, "SD3.5-Large": 8.06, "Z-Image": 6.15, "FLUX.1-dev": 11.90}  # billions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_the_published_ones(name):
    assert ARCHITECTURES[name].count_parameters() / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


@pytest.mark.parametrize(("name", "width", "layers"), [("SD3-Medium", 1536, 24), ("SD3.5-Large", 2432, 38)])
@pytest.mark.parametrize("side", [64, 128])
def test_flops_are_those_of_the_joint_transformer(name, width, layers, side):
    """By hand, 2 a multiply-add: a block has 12 d^2 weights for each image token and as many for each text token (the
    last block only the 3 d^2 of q, k, v for text), and attends from all tokens to all, in the last block too."""
    image, text = (side // 2) ** 2, 333
    blocks = 12 * width**2 * (layers * image + (layers - 1) * text) + 3 * width**2 * text
    attention = layers * 2 * (image + text) ** 2 * width
    ends = image * width * (64 + 64) + text * width * 4096
    modulation = (layers * 6 + (layers - 1) * 6 + 2 + 2) * width**2
    by_hand = 2 * (blocks + attention + ends + modulation)
    assert ARCHITECTURES[name].count_flops(side) == pytest.approx(by_hand, rel=2e-3)
