"""A trained student -> forms that need no code of ours; parity.py shows that each draws the same images.

1. Every form is float32 throughout: the network as it was trained, the other parts as the method loaded them. Mixed
   precision in one folder does not load as one dtype, and half precision is one `.to(torch.float16)` away.
2. A LoRA student is fused into its base in every form but `lora`, which is the LoRA alone for `load_lora_weights`.
3. What a call has to be told lies in the files themselves: `metadata`, and a scheduler/ beside a network alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from dmdr.backbones.protocol import Backbone
from dmdr.errors import DataError
from dmdr.teacher.original_layout import LAYOUTS, to_original

WEIGHTS = "student_ema.safetensors"  # of a training stage: what is exported and evaluated
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
NETWORK_FILE = "diffusion_pytorch_model.safetensors"  # the same for a network
ARCHITECTURES = {  # family -> the model's name in modelspec, the code whose keys a single file has
    "sdxl": ("stable-diffusion-xl-v1-base", "sgm"),
    "sd3": ("stable-diffusion-3", "sd3"),
    "z-image": ("z-image", "diffusers"),
    "flux": ("flux-1-dev", "diffusers"),
}


def load_student(network: torch.nn.Module, folder: Path) -> dict:
    """Turn the teacher's network into the student of a training stage, in place; a LoRA is fused. Returns student.json.

    Raises:
        DataError: the weights are damaged, or are not this network's.
    """
    facts = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    try:
        weights = load_file(folder / WEIGHTS)
        if facts["form"] == "full":
            network.load_state_dict(weights, strict=True)
        else:
            fuse_lora(network, weights)
    except (SafetensorError, RuntimeError, KeyError) as error:
        message = " ".join(str(error.args[0]).split())[:300]
        raise DataError(
            f"{folder / WEIGHTS} is not a student of this teacher: {message}; give the teacher that it was trained "
            "from, or train it again"
        ) from error
    return facts


def fuse_lora(network: torch.nn.Module, lora: dict[str, torch.Tensor]) -> None:
    """Add a LoRA (diffusers keys, alpha = rank) to the network's own weights; no adapter remains."""
    known = dict(network.named_modules())
    foreign = [key for key in lora if key.split(".lora_")[0] not in known]
    if foreign or not lora:
        raise KeyError(f"LoRA for {foreign[0] if foreign else 'nothing'}, which the teacher does not have")
    network.load_lora_adapter(lora, prefix=None, adapter_name="student")
    network.fuse_lora()
    network.unload_lora()
    network.requires_grad_(False)


def build_metadata(backbone: Backbone, steps: int, *, title: str, teacher: str) -> dict[str, str]:
    """What a safetensors file of the student says of itself, `modelspec.*` as other tools read it.

    teacher: its digest.
    """
    scheduler, side = backbone.student_scheduler(steps), backbone.resolution
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[backbone.family][0],
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "dmdr.steps": str(steps),
        "dmdr.timesteps": json.dumps([round(t, 3) for t in backbone.student_timesteps(steps).tolist()]),
        "dmdr.scheduler": type(scheduler).__name__,
        "dmdr.scheduler_config": json.dumps(config),
        "dmdr.guidance_scale": f"{backbone.plain_guidance:g}",
        "dmdr.resolution": str(side),
        "dmdr.teacher": teacher,
    }


def write_form(form: str, backbone: Backbone, weights: Path, steps: int, out: Path, about: dict[str, str]) -> None:
    """A form of the student into its folder under `out`. The backbone's network is the student.

    weights: the student's own, as they were trained. about: `metadata`.
    """
    network, folder = backbone.network, out / form
    if form == "pipeline":
        save_pipeline(backbone, network, steps, folder)
    elif form == "lora":
        save_lora(backbone, weights, steps, folder, about)
    elif form == "weights":
        save_weights(backbone, network, steps, folder, about)
    else:
        save_single_file(backbone, network, folder / f"{about['modelspec.title']}.safetensors", about)


def save_pipeline(backbone: Backbone, network: torch.nn.Module, steps: int, folder: Path) -> None:
    """The whole diffusers folder: `network` with the few-step scheduler and the teacher's other parts."""
    disable_progress_bars()
    backbone.build_student_pipeline(network, steps).save_pretrained(folder, safe_serialization=True)


def save_lora(backbone: Backbone, weights: Path, steps: int, folder: Path, about: dict[str, str]) -> None:
    """The student's LoRA alone, for `load_lora_weights` on the teacher's pipeline, and its scheduler.

    diffusers names each tensor by the part of the pipeline it belongs to: transformer. or unet.
    """
    part = network_part(backbone)
    backbone.student_scheduler(steps).save_pretrained(folder / "scheduler")
    save_file({f"{part}.{key}": value for key, value in load_file(weights).items()}, folder / LORA_FILE, about)


def save_weights(backbone: Backbone, network: torch.nn.Module, steps: int, folder: Path, about: dict[str, str]) -> None:
    """The network alone, for `from_pretrained` of its class, and its scheduler."""
    network.save_config(folder)
    backbone.student_scheduler(steps).save_pretrained(folder / "scheduler")
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, folder / NETWORK_FILE, about)


def save_single_file(backbone: Backbone, network: torch.nn.Module, file: Path, about: dict[str, str]) -> None:
    """Network, VAE and text encoders as one file in the original layout of the family.

    Raises:
        DataError: a tensor has no place there.
    """
    file.parent.mkdir(parents=True)
    weights = to_original(backbone.family, {**_parts(backbone), network_part(backbone): network.state_dict()})
    save_file(weights, file, {**about, "modelspec.implementation": ARCHITECTURES[backbone.family][1]})


def check_single_file(backbone: Backbone) -> None:
    """Ask early, and without a copy of the network, whether `save_single_file` will find a place for every tensor.

    Raises:
        DataError: it will not.
    """
    parts = _parts(backbone)
    for part in parts.keys() - {"text_encoder"}:  # the only part whose values matter
        parts[part] = {name: weight.to("meta") for name, weight in parts[part].items()}
    to_original(backbone.family, parts)


def network_part(backbone: Backbone) -> str:
    """The name of the network among the parts of its pipeline: transformer or unet."""
    return next(name for name, part in backbone.pipe.components.items() if part is backbone.network)


def absent_text_encoders(backbone: Backbone) -> list[str]:
    """The text encoders and tokenizers that the teacher lacks, as SD3 may its T5; diffusers wants to be told."""
    parts = backbone.pipe.components.items()
    return [name for name, part in parts if part is None and name.startswith(("text_encoder", "tokenizer"))]


def _parts(backbone: Backbone) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each part that the family's original layout has."""
    parts = {part: backbone.pipe.components[part] for part in LAYOUTS[backbone.family]}
    return {part: module.state_dict() for part, module in parts.items() if module is not None}


def disable_progress_bars() -> None:
    """Both libraries draw a bar for each part that they read or write, whatever the log is."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
