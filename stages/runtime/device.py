"""Pick the device that a stage computes on."""

from __future__ import annotations

import torch

from dmdr.config.run import Config


def pick_device(config: Config) -> str:
    """`execution.device`, where auto is CUDA if there is any."""
    if config.execution.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.execution.device


def name_device(config: Config) -> str:
    """The device's name for a reader, such as NVIDIA H100 80GB HBM3."""
    if pick_device(config) == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return "one thread of a CPU" if threads == 1 else f"{threads} threads of a CPU"
