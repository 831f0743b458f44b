"""The optimizers of student and fake score: AdamW of torch, plain or fused, or with moments of 8 bits."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dmdr import distributed
from dmdr.config.run import Optimizer, Training
from dmdr.errors import ConfigError


def check_optimizers(training: Training, stage: str, *, split: bool) -> None:
    """split: whether the weights of a full student are split over several ranks.

    Raises:
        ConfigError: an optimizer that is not installed, or cannot have split weights.
    """
    for network, config in {"student": training.student, "fake_score": training.fake_score}.items():
        if config.kind == "8bit" and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{stage}.{network}.kind 8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or "
                "set kind: fused"
            )
    if split and training.student.kind == "8bit":
        raise ConfigError(
            f"{stage}.student.kind 8bit cannot have a full student that execution.sharding fsdp splits; set kind: "
            "fused, sharding: none, or student.form: lora"
        )


def build_optimizer(parameters: dict[str, torch.nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    settings = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.kind == "8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters.values(), **settings)
    return torch.optim.AdamW(parameters.values(), **settings, **({"fused": True} if config.kind == "fused" else {}))


def learning_rate(config: Optimizer, update: int, updates: int) -> float:
    """Of an update, counted from 0; a stage that was stopped and resumed has the same ones."""
    if config.final_learning_rate is None:
        return config.learning_rate
    return config.learning_rate + (config.final_learning_rate - config.learning_rate) * update / max(1, updates - 1)


def read_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer knows of a parameter, empty before its first step. No two tensors share memory."""
    state = {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
    # bitsandbytes has one table of the values of 8 bits for all parameters
    return {key: value.clone() if key.startswith("qmap") else value for key, value in state.items()}


def restore_state(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor], kind: str
) -> None:
    """The reverse of `state_of`, from whole tensors."""
    state: dict[str, torch.Tensor | int] = {}
    for key, value in saved.items():
        if key == "step":  # which bitsandbytes counts as a number, and only the fused AdamW on the device
            on_device = value.to(parameter.device if kind == "fused" else "cpu", copy=True)
            state[key] = int(value) if kind == "8bit" else on_device
        elif value.shape == parameter.shape:
            state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            distributed.copy_shard(state[key], value)
        else:
            state[key] = value.to(parameter.device, copy=True)
    optimizer.state[parameter] = state
