"""The full weights of a start: compared with the teacher's network by their headers, then read.

Files have diffusers' names, or those under which the family was published. diffusers renames the latter. Given meta
tensors it renames shapes alone, so that a file is checked without its weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from dmdr.errors import DataError
from dmdr.teacher.json_file import read_object
from dmdr.teacher.key_map import Weights
from dmdr.teacher.original_layout import unet_to_original
from dmdr.teacher.start_files import KEY, StartSource
from dmdr.teacher.start_headers import StartHeader

if TYPE_CHECKING:
    from diffusers import ModelMixin

WHOLE = "model.diffusion_model."  # where a file with all parts of a pipeline has its network
PREFIXES = (WHOLE, "diffusion_model.", "transformer.", "unet.", "model.")
NOT_OF_THE_FUNCTION = {"sample_size"}  # settings of a network that change none of its outputs
SHOWN = 60  # characters of a setting's value in a message


def check_network(source: StartSource, header: StartHeader, network: ModelMixin) -> None:
    """Compare full weights with the teacher's network, which may lie on meta.

    Raises:
        DataError: they are of another architecture, lack a tensor, or have one too many or one of another shape.
    """
    if source.config is not None:
        _check_settings(source, network)
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}
    found = rename(source, on_meta, network)
    expected, kind = network.state_dict(), type(network).__name__
    buffers = {name for name, _ in network.named_buffers()}
    missing, extra = sorted(expected.keys() - found.keys() - buffers), sorted(found.keys() - expected.keys())
    if missing or extra:
        which, names = ("lacks", missing) if missing else ("has", extra)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DataError(
            f"{KEY} {source.address} {which} the tensor {names[0]}{more}, unlike the teacher's {kind}; give a start of "
            "the teacher's own architecture"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise DataError(
                f"{KEY} {source.address} has {name} of shape {tuple(tensor.shape)}, but the teacher's {kind} has "
                f"{tuple(expected[name].shape)}; give a start of the teacher's own architecture"
            )


def read_network(source: StartSource, network: ModelMixin) -> Weights:
    """The full weights of a start under diffusers' names, in the precision of their files. `check_network` first."""
    from safetensors.torch import load_file

    weights: Weights = {}
    for file in source.files:
        weights |= load_file(file)
    return rename(source, weights, network)


def rename(source: StartSource, tensors: Mapping[str, torch.Tensor], network: ModelMixin) -> Weights:
    """The tensors of a network under diffusers' names; those of other parts of a pipeline are left out.

    Raises:
        DataError: they are not those of a network of this family.
    """
    expected = set(network.state_dict())
    named = _select_network(tensors, expected)
    if expected <= named.keys():
        return named
    try:
        original = _from_original(named, network)
    except Exception as error:  # a converter that meets another network raises whatever comes first
        if _are_most(named, expected):
            return named
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{KEY} {source.address} holds no {type(network).__name__}: its tensors, such as {min(tensors)}, have "
            "neither diffusers' names nor those of the teacher's family; give a start of the teacher's architecture"
        ) from error
    return min(named, original, key=lambda found: len(expected.symmetric_difference(found)))


def _are_most(named: Mapping[str, torch.Tensor], expected: set[str]) -> bool:
    """Whether tensors have diffusers' names: a few of them are the same in the layout of the family."""
    return 2 * len(expected.intersection(named)) > len(expected)


def _select_network(tensors: Mapping[str, torch.Tensor], expected: set[str]) -> Weights:
    """The tensors of the network, without the prefix that a file may give them."""
    if _are_most(tensors, expected):
        return dict(tensors)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return dict(tensors)


def _from_original(named: Weights, network: ModelMixin) -> Weights:
    """diffusers' names for those under which the family was published.

    Raises:
        DataError: a tensor has no place in the network.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind = type(network).__name__
    if kind == "UNet2DConditionModel":  # its converter takes what it knows and drops the rest
        on_meta = {name: value.to("meta") for name, value in network.state_dict().items()}
        if unknown := sorted(named.keys() - unet_to_original(on_meta).keys()):
            raise DataError(f"{KEY} has the tensor {unknown[0]}, which has no place in the teacher's {kind}")
        given = {f"{WHOLE}{name}": value for name, value in named.items()}
    else:
        given = dict(named)
    convert: Callable[..., Weights] = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]  # type: ignore[index]
    renamed = convert(checkpoint=given, config=dict(network.config))
    if kind != "UNet2DConditionModel" and given:  # the other converters take out what they know
        raise DataError(f"{KEY} has the tensor {min(given)}, which has no place in the teacher's {kind}")
    return renamed


def _check_settings(source: StartSource, network: ModelMixin) -> None:
    """Refuse a network whose class or settings are not the teacher's: such as heads, which no shape tells.

    Raises:
        DataError: with the first that differs.
    """
    assert source.config is not None
    found, kind = read_object(source.config), type(network)
    if found.get("quantization_config") is not None:
        raise DataError(f"{KEY} {source.address}: its weights are quantised; give them in bfloat16 or float16")
    if (name := found.get("_class_name", kind.__name__)) != kind.__name__:
        raise DataError(
            f"{KEY} {source.address} is a {name}, and the teacher's network is a {kind.__name__}; give a start of the "
            "teacher's architecture"
        )
    ours = json.loads(json.dumps(dict(network.config)))
    for key, value in ours.items():
        if key.startswith("_") or key in NOT_OF_THE_FUNCTION or key not in found or found[key] == value:
            continue
        raise DataError(
            f"{KEY} {source.address} has {key}: {json.dumps(found[key])[:SHOWN]} in its config.json, and the teacher "
            f"has {json.dumps(value)[:SHOWN]}; give a start of the teacher's architecture"
        )
