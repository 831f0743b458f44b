"""The LoRA of a start: its tensors under the names of the network's modules, each with the scale at which it runs.

The names in LoRA files differ by program, and diffusers renames them. A LoRA's alpha stands beside its tensors, in the
settings that diffusers and PEFT write, or nowhere: then it is the rank, and the scale is 1. A LoRA is small: it is
checked against the teacher's network, which may lie on meta, before any weights of a network are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dmdr.errors import DataError
from dmdr.teacher.json_file import read_object
from dmdr.teacher.key_map import Weights
from dmdr.teacher.start_files import KEY, StartSource

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

PEFT_PREFIX = "base_model.model."
OF_TEXT = ("text_encoder", "lora_te")
OUTER = ("unet.", "transformer.", "lora_unet_", "diffusion_model.")  # how names of a LoRA of a network begin
SETTINGS = "lora_adapter_metadata"  # under which diffusers keeps PEFT's settings in a file
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
Settings = Mapping[str, object]


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA adds to the weight of one module: scale * up @ down.

    down: (rank, in) and up: (out, rank); of a convolution (rank, in, h, w) and (out, rank, 1, 1).
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def compute_delta(self, shape: torch.Size) -> torch.Tensor:
        """What it adds to a weight of this shape."""
        return self.scale * (self.up.flatten(1) @ self.down.flatten(1)).view(shape)


def read_lora(
    source: StartSource, network: ModelMixin, pipeline: type[DiffusionPipeline], *, scale: float = 1.0
) -> dict[str, LoraModule]:
    """The LoRA of a start in float32: module of the network -> what it adds.

    Args:
        network: the teacher's; it is not changed.
        pipeline: the teacher's class, which knows the names in its family's LoRA files.
        scale: at which it runs, beside its own alpha.

    Raises:
        DataError: it adapts modules that the network lacks or that have other shapes, or text encoders, or its names
            are unknown.
    """
    from safetensors.torch import load_file

    weights = {name: value.float() for name, value in load_file(source.files[0]).items()}
    part = "unet" if type(network).__name__.startswith("UNet") else "transformer"
    named = _rename(source, weights, part, network, pipeline)
    alphas = {name.removesuffix(ALPHA): float(named.pop(name)) for name in [*named] if name.endswith(ALPHA)}
    modules = _pair_halves(source, named, network)
    settings = _read_settings(source, part)
    return {
        name: LoraModule(down, up, scale * _compute_scale(name, len(down), alphas, settings))
        for name, (down, up) in modules.items()
    }


def _rename(
    source: StartSource, weights: Weights, part: str, network: ModelMixin, pipeline: type[DiffusionPipeline]
) -> Weights:
    """The tensors as PEFT names them, `<module>.lora_A.weight`, and `<module>.alpha`."""
    weights = {name.removeprefix(PEFT_PREFIX): value for name, value in weights.items()}
    if of_text := sorted(name for name in weights if name.startswith(OF_TEXT)):
        raise DataError(
            f"{KEY} {source.address} also adapts a text encoder ({of_text[0]}), which a student shares with its "
            "teacher; give a LoRA of the network alone"
        )
    weights = {name if name.startswith(OUTER) else f"{part}.{name}": value for name, value in weights.items()}
    if not all(name.startswith(f"{part}.") and name.endswith((DOWN, UP, ALPHA)) for name in weights):
        try:
            weights = _let_diffusers_rename(weights, part, network, pipeline)
        except Exception as error:  # a converter that meets another network raises whatever comes first
            raise DataError(
                f"{KEY} {source.address} is a LoRA with tensors such as {min(weights)}, which diffusers does not know "
                f"of a {pipeline.__name__}; give a LoRA of the teacher"
            ) from error
    return {name.removeprefix(f"{part}."): value for name, value in weights.items()}


def _let_diffusers_rename(
    weights: Weights, part: str, network: ModelMixin, pipeline: type[DiffusionPipeline]
) -> Weights:
    """The LoRA as `_rename` returns it, but with the name of the part before each module."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    from dmdr.backbones.latent import silence_diffusers

    read: Callable[..., object] = pipeline.lora_state_dict  # type: ignore[attr-defined]  # each family's pipeline has it
    options: dict[str, object] = {"unet_config": network.config} if part == "unet" else {}
    if pipeline.__name__ == "FluxPipeline":
        options = {"return_alphas": True}
    with silence_diffusers():
        found = read(dict(weights), **options)
    renamed, alphas = found if isinstance(found, tuple) else (found, None)
    assert isinstance(renamed, dict)
    if part == "unet":
        renamed = convert_unet_state_dict_to_peft(renamed)
        alphas = convert_unet_state_dict_to_peft(alphas or {})
    modules = {name.removesuffix(ALPHA).removesuffix(DOWN): alpha for name, alpha in (alphas or {}).items()}
    return {**renamed, **{f"{name}{ALPHA}": torch.as_tensor(float(alpha)) for name, alpha in modules.items()}}


def _pair_halves(
    source: StartSource, weights: Weights, network: ModelMixin
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> its down and up, compared with the network's module.

    Raises:
        DataError: a module is missing in the network, or has another shape; or one half is missing.
    """
    known, kind = dict(network.named_modules()), type(network).__name__
    for name in sorted(weights):
        module = known.get(name.removesuffix(DOWN).removesuffix(UP))
        if not name.endswith((DOWN, UP)) or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            raise DataError(
                f"{KEY} {source.address} adapts {name}, which the teacher's {kind} does not have; give a LoRA of this "
                "teacher"
            )
        weight, shape = module.weight, weights[name].shape
        fits = shape[1:] == weight.shape[1:] if name.endswith(DOWN) else shape[0] == weight.shape[0]
        if not fits:
            raise DataError(
                f"{KEY} {source.address} has {name} of shape {tuple(shape)}, which does not fit the teacher's module "
                f"of shape {tuple(weight.shape)}; give a LoRA of this teacher"
            )
    downs, ups = ({name.removesuffix(end) for name in weights if name.endswith(end)} for end in (DOWN, UP))
    if alone := sorted(downs ^ ups):
        raise DataError(f"{KEY} {source.address} has only one half of the LoRA of {alone[0]}; fetch it again")
    pairs = {name: (weights[f"{name}{DOWN}"], weights[f"{name}{UP}"]) for name in sorted(downs)}
    for name, (down, up) in pairs.items():
        if up.shape[1] != len(down):
            raise DataError(
                f"{KEY} {source.address}: the halves of {name} have the ranks {len(down)} and {up.shape[1]}; fetch it "
                "again"
            )
    return pairs


def _read_settings(source: StartSource, part: str) -> Settings:
    """PEFT's settings of a LoRA, from the file's metadata or from adapter_config.json; empty if it has none."""
    from safetensors import safe_open

    if source.adapter is not None:
        return read_object(source.adapter)
    with safe_open(source.files[0], framework="pt") as header:
        text = (header.metadata() or {}).get(SETTINGS)
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise DataError(f"{KEY} {source.address}: its metadata {SETTINGS} is not JSON; fetch it again") from error
    return {key.removeprefix(f"{part}."): value for key, value in found.items()}


def _compute_scale(module: str, rank: int, alphas: Mapping[str, float], settings: Settings) -> float:
    """alpha / rank, as PEFT computes it; 1 where no alpha is known."""
    from peft.utils.other import get_pattern_key

    if module in alphas:
        return alphas[module] / rank
    alpha = settings.get("lora_alpha")
    pattern = settings.get("alpha_pattern")
    if isinstance(pattern, dict) and pattern:
        alpha = pattern.get(get_pattern_key([*pattern], module), alpha)
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
