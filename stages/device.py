"""Which device a stage computes on."""

from __future__ import annotations

import torch

from dmdr.config import Config


def device(config: Config) -> str:
    """`execution.device`, where auto is CUDA if there is any."""
    if config.execution.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.execution.device
