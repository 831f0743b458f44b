"""Reading the weights of reward models, which come as safetensors or as torch archives of nothing but tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dmdr.errors import DataError

LINEAR = (0, 2, 4, 6, 7)  # of the MLP's nn.Sequential


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in float32. An archive is read by open_clip with weights_only: it runs no code of its own.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    from open_clip.factory import load_state_dict

    try:
        return {key: value.float() for key, value in load_state_dict(str(path), weights_only=True).items()}
    except Exception as error:  # each format has errors of its own
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"weights {path} ({path.stat().st_size:,} bytes) cannot be read ({type(error).__name__}: {said}); fetch "
            "them again"
        ) from error


def read_linear(weights: dict[str, torch.Tensor], prefix: str, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """w (D,) and b () in float64 of the MLP that LAION's aesthetic score and ImageReward have: five linear layers with
    nothing but dropouts between them, multiplied out.

    Raises:
        DataError: a layer is missing, or does not fit the next.
    """
    try:
        layers = [(weights[f"{prefix}{n}.weight"].double(), weights[f"{prefix}{n}.bias"].double()) for n in LINEAR]
        weight, bias = layers[0]
        for next_weight, next_bias in layers[1:]:
            weight, bias = next_weight @ weight, next_weight @ bias + next_bias
        return weight.squeeze(0), bias.squeeze(0)
    except (KeyError, RuntimeError) as error:
        raise DataError(f"weights {path} lack the MLP's layers ({error}); fetch them again") from error


def fill_module(module: nn.Module, weights: dict[str, torch.Tensor], path: Path, what: str) -> None:
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
