"""Read the weights of reward models: safetensors, torch archives that hold tensors only, folders of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from dmdr.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound="PreTrainedModel")
LINEAR_LAYERS = (0, 2, 4, 6, 7)  # of the MLP, whose nn.Sequential has dropouts between them


def shorten(error: Exception) -> str:
    """The message of a library's error in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, in float32. An archive is read with weights_only: no code in it runs.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    from open_clip.factory import load_state_dict

    try:
        return {key: value.float() for key, value in load_state_dict(str(path), weights_only=True).items()}
    except Exception as error:  # each format has errors of its own
        raise DataError(
            f"weights {path} ({path.stat().st_size:,} bytes) cannot be read "
            f"({type(error).__name__}: {shorten(error)}); fetch them again"
        ) from error


def read_linear(weights: dict[str, torch.Tensor], prefix: str, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The MLP of LAION's aesthetic score and of ImageReward as one affine map: w (D,) and b (), in float64.

    The MLP has five linear layers with dropouts between them and no activations, so that their product is the MLP.

    Raises:
        DataError: a layer is missing, or does not fit the one before.
    """
    try:
        layers = [
            (weights[f"{prefix}{n}.weight"].double(), weights[f"{prefix}{n}.bias"].double()) for n in LINEAR_LAYERS
        ]
        weight, bias = layers[0]
        for next_weight, next_bias in layers[1:]:
            weight, bias = next_weight @ weight, next_weight @ bias + next_bias
        return weight.squeeze(0), bias.squeeze(0)
    except (KeyError, RuntimeError) as error:
        raise DataError(f"weights {path} lack the MLP's layers ({error}); fetch them again") from error


def fill_module(module: nn.Module, weights: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """Give a module all of its tensors from `weights`, and freeze it. what: the module's name for error messages.

    Raises:
        DataError: a tensor is missing, left over or of another shape; the message names it.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise DataError(f"weights {path} lack {name}, which {what} has; they belong to another model")
        if name not in expected:
            raise DataError(f"weights {path} have {name}, which {what} lacks; they belong to another model")
        if expected[name].shape != weights[name].shape:
            raise DataError(
                f"weights {path}: {name} is {tuple(weights[name].shape)}, {what} has {tuple(expected[name].shape)}; "
                "they belong to another model"
            )
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval()


@contextmanager
def refuse_unreadable(kind: type[PreTrainedModel], folder: Path, name: str = "weights") -> Iterator[None]:
    """Turn the errors of reading a folder of transformers into a DataError. name: the setting that gives the folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{name} {folder} cannot be loaded as a {kind.__name__} ({shorten(error)}); fetch them again"
        ) from error


def load_pretrained(kind: type[ModelT], folder: Path, device: str, name: str = "weights") -> ModelT:
    """The model of a folder that transformers saved, frozen, in float32. name: the setting that gives the folder.

    Raises:
        DataError: the folder is damaged, lacks a tensor or holds another model.
    """
    with refuse_unreadable(kind, folder, name):
        # annotated to return a model, but with output_loading_info it returns a pair
        loaded: tuple[ModelT, dict[str, set[str]]] = kind.from_pretrained(  # type: ignore[assignment]
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    model, report = loaded
    if report["missing_keys"]:
        raise DataError(f"{name} {folder} lack the tensor {min(report['missing_keys'])}; fetch them again")
    model.requires_grad_(False).eval().to(device)
    return model
