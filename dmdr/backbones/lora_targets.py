"""Find the modules of a network that a LoRA adapts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dmdr.config.lora import Preset
from dmdr.errors import ConfigError

SHOWN = 6  # names in a message


def list_linears(network: nn.Module, blocks: Iterable[str]) -> tuple[str, ...]:
    """The names of all linear layers in a network's lists of blocks."""
    lists = tuple(f"{block}." for block in blocks)
    return tuple(name for name, module in network.named_modules() if _is_linear(module) and name.startswith(lists))


def select_targets(
    network: nn.Module,
    targets: Preset | tuple[str, ...],
    *,
    attention: tuple[str, ...],
    wide: tuple[str, ...],
    key: str,
) -> list[str]:
    """The names, or endings of names, of the modules that a LoRA adapts.

    Args:
        network: without adapters.
        targets: as in a config. attention, wide: what the presets are in this network's family.
        key: the setting, for the message.

    Raises:
        ConfigError: a name matches no layer that a LoRA can adapt.
    """
    if not isinstance(targets, tuple):
        return list(attention if targets == "attention" else wide)
    layers = [name for name, module in network.named_modules() if _is_linear(module) or isinstance(module, nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers if not name[-1].isdigit()))
            raise ConfigError(
                f"{key} has {target}, which is no linear or convolutional layer of the teacher's network; its layers "
                f"end in {', '.join(endings[:SHOWN])} and others, and wide takes all of its blocks"
            )
    return list(targets)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
