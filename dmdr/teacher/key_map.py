"""Rename the tensors of a network by the places of their modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dmdr.errors import DataError

Weights = dict[str, torch.Tensor]
Places = dict[str, str]  # name of a module -> its name in the original layout


def rename_modules(weights: Weights, places: Places, fused: Mapping[str, Sequence[str]] | None = None) -> Weights:
    """Rename each tensor by the place of its module.

    Args:
        fused: beginning of a key -> the modules whose weights, and whose biases, are concatenated under it.

    Raises:
        DataError: a tensor has no place, or one that `fused` needs is missing.
    """
    rest = dict(weights)
    renamed: Weights = {}
    for beginning, modules in (fused or {}).items():
        for kind in ("weight", "bias"):
            keys = [f"{module}.{kind}" for module in modules]
            missing = [key for key in keys if key not in rest]
            if missing:
                raise DataError(f"the teacher has no {missing[0]}, which the original layout of its family needs")
            renamed[f"{beginning}{kind}"] = torch.cat([rest.pop(key) for key in keys])
    for key, weight in rest.items():
        module = _find_placed_module(key, places)
        if module is None:
            raise DataError(
                f"{key} has no place in the original layout of its family, which does not know this variant of the "
                "teacher; take single-file out of export.forms"
            )
        renamed[places[module] + key.removeprefix(module)] = weight
    return renamed


def _find_placed_module(key: str, places: Places) -> str | None:
    """The longest beginning of a tensor's key, in whole words, that has a place."""
    words = key.split(".")
    for count in range(len(words), 0, -1):
        module = ".".join(words[:count])
        if module in places:
            return module
    return None


def list_children(weights: Weights, parent: str) -> list[str]:
    """parent.0, parent.1, ... as far as such modules exist."""
    numbers = {int(key[len(parent) + 1 :].split(".")[0]) for key in weights if key.startswith(f"{parent}.")}
    return [f"{parent}.{number}" for number in sorted(numbers)]
