"""Settings of the live page, of money and of trackers: what is refused, and what a device costs."""

from __future__ import annotations

import json

import pytest

from dmdr.config.execution import Execution
from dmdr.config.price import Price


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"budget": 50.0}, "execution.budget is set but execution.price is missing"),
        ({"budget": 0.0, "price": {"hour": {"H100": 2.5}}}, "greater than 0"),
        ({"price": {"hour": {}}}, "at least 1"),
        ({"price": {"hour": {"H100": -1.0}}}, "greater than 0"),
        ({"price": {"hour": {"H100": 2.5}, "currency": "euros"}}, "currency"),
        ({"trackers": ["tensorboard", "tensorboard"]}, "names one twice"),
        ({"trackers": ["comet"]}, "tensorboard"),
        ({"trackers": ["wandb"], "live": None}, "execution.live is null"),
        ({"live": {"strips_every": 0}}, "greater than 0"),
        ({"live": {"keep_strips": 1}}, "greater than or equal to 2"),
        ({"live": {"colour": True}}, "Extra inputs"),
        ({"gradient_checkpointing": "yes"}, "'none', 'attention', 'blocks' or 'all'"),
        ({"gradient_checkpointing": 1}, "'none', 'attention', 'blocks' or 'all'"),
        (
            {"compile": True, "gradient_checkpointing": "attention"},
            "set execution.gradient_checkpointing: none, blocks",
        ),
        ({"attention": "math"}, "'auto', 'flash', 'cudnn' or 'fa3'"),
        ({"decode_batch_size": 0}, "greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        Execution.model_validate(settings)


def test_the_switch_of_old_configs_is_read_as_what_it_did():
    for old, new in {True: "all", False: "none"}.items():
        assert Execution(gradient_checkpointing=old) == Execution(gradient_checkpointing=new)
        assert json.loads(Execution(gradient_checkpointing=old).model_dump_json())["gradient_checkpointing"] == new


def test_a_device_is_known_by_the_longest_part_of_its_name():
    price = Price(hour={"h100": 2.0, "H100 80GB": 3.6, "cpu": 0.036})
    assert price.find("NVIDIA H100 80GB HBM3") == 3.6 and price.find("NVIDIA H100 PCIe") == 2.0
    assert price.find("NVIDIA A100") is None
    assert price.count({"NVIDIA H100 80GB HBM3": 1000.0, "cpu": 100.0}) == pytest.approx(1.001)
    assert price.count({"NVIDIA A100": 1.0, "cpu": 1.0}) is None, "half of the money would mislead"
    assert price.count({}) == 0
