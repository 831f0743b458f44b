"""Ranks: what is refused before they form a group."""

from __future__ import annotations

import pytest
import torch

from dmdr import distributed
from dmdr.errors import ConfigError


def test_a_rank_without_a_gpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="one a GPU, and this machine has 2; set execution.processes to 2"):
        distributed.join("cuda", 2)
    assert distributed.ranks() == 1, "no group was entered"
