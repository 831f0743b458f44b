"""Reading the weights of reward models, which come as safetensors or as torch archives of nothing but tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dmdr.errors import DataError


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in float32; a torch archive is read with weights_only, which runs no code of its own.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = found.get("state_dict", found)
        return {key.removeprefix("module."): value.float() for key, value in found.items()}
    except (SafetensorError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"weights {path} ({path.stat().st_size:,} bytes) cannot be read ({type(error).__name__}: {said}); fetch "
            "them again"
        ) from error


def fill(module: nn.Module, weights: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """All of a module's tensors from weights, which hold nothing else; frozen.

    Raises:
        DataError: one is missing, left over or of another shape; the message names it.
    """
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise DataError(f"weights {path} lack {name}, which {what} has; they are of another model")
        if name not in wanted:
            raise DataError(f"weights {path} have {name}, which {what} has not; they are of another model")
        if wanted[name].shape != weights[name].shape:
            raise DataError(
                f"weights {path}: {name} is {tuple(weights[name].shape)}, {what} has {tuple(wanted[name].shape)}; "
                "they are of another model"
            )
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval()
