"""Copies from the CPU to a device that nobody waits for."""

from __future__ import annotations

import torch


def send(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor on the device and in the dtype of `like`."""
    return send_to(value, like.device, like.dtype)


def send_to(value: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on a device, in a dtype if one is named.

    A copy from memory that is not pinned would wait until the GPU has done all that it was told before.
    """
    if dtype is not None and value.device.type == "cpu":
        value = value.to(dtype)
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, dtype or value.dtype, non_blocking=True)
