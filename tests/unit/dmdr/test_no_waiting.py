"""On a GPU nothing in an update waits for the device until the figures are read."""

from __future__ import annotations

import pytest
import torch

import dmdr.train
from dmdr.train import training_step
from tests.support.ranked_updates import CASES, make_run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU nothing is waited for")
@pytest.mark.parametrize("case", CASES)
def test_an_update_makes_the_cpu_wait_once(case, tiny_sd3_folder, monkeypatch):
    run, state = make_run(tiny_sd3_folder, case, device="cuda")
    training_step(run, state)  # which fills caches
    read = dmdr.train.to_floats

    def read_at_the_end(figures):
        torch.cuda.set_sync_debug_mode("default")
        return read(figures)

    monkeypatch.setattr(dmdr.train, "to_floats", read_at_the_end)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert training_step(run, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
