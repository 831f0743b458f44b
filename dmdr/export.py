"""A trained student -> a diffusers folder that needs no code of ours, and the proof that it draws the same images.

1. The folder is float32 throughout: the network as it was trained, the other parts as the method loaded them. Mixed
   precision in one folder does not load as one dtype, and half precision is one `.to(torch.float16)` away.
2. A LoRA student is written twice: fused into its base, and alone in the form of `load_lora_weights`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from dmdr.backbones import Backbone
from dmdr.errors import DataError
from dmdr.rollout import student_sample

WEIGHTS = "student_ema.safetensors"  # of a training stage: what is exported and evaluated
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
PROBES = ("a red circle", "two blue squares above a green cross", "a photo of three trees")  # of the parity check
TOLERANCE = 1e-3  # greatest absolute difference of latents, whose standard deviation is about 1: float32 leaves 1e-5,
# in a student that RL alone has driven far 1.5e-4, and a wrong scheduler or weight 0.1 and more


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
            fuse(network, weights)
    except (SafetensorError, RuntimeError, KeyError) as error:
        message = " ".join(str(error).split())[:300]
        raise DataError(f"{folder / WEIGHTS} is not a student of this teacher: {message}; train it again") from error
    return facts


def fuse(network: torch.nn.Module, lora: dict[str, torch.Tensor]) -> None:
    """Add a LoRA (diffusers keys, alpha = rank) to the network's own weights; no adapter remains."""
    known = dict(network.named_modules())
    foreign = [key for key in lora if key.split(".lora_")[0] not in known]
    if foreign or not lora:
        raise KeyError(f"LoRA for {foreign[0] if foreign else 'nothing'}, which the teacher does not have")
    network.load_lora_adapter(lora, prefix=None, adapter_name="student")
    network.fuse_lora()
    network.unload_lora()
    network.requires_grad_(False)


def save_pipeline(backbone: Backbone, network: torch.nn.Module, steps: int, folder: Path) -> None:
    """The whole diffusers folder: `network` with the few-step scheduler and the teacher's other parts."""
    _no_bars()
    backbone.pipeline(network, backbone.student_scheduler(steps)).save_pretrained(folder, safe_serialization=True)


def save_lora(backbone: Backbone, weights: Path, folder: Path) -> None:
    """The student's LoRA alone, for `load_lora_weights` on the teacher's pipeline.

    diffusers names each tensor by the part of the pipeline it belongs to: transformer. or unet.
    """
    parts = backbone.pipeline(backbone.network, backbone.student_scheduler(1)).components
    part = next(name for name, component in parts.items() if component is backbone.network)
    folder.mkdir(parents=True)
    save_file(
        {f"{part}.{key}": value for key, value in load_file(weights).items()}, folder / LORA_FILE, {"format": "pt"}
    )


@torch.no_grad()
def parity(backbone: Backbone, network: torch.nn.Module, steps: int, folder: Path, *, seed: int) -> float:
    """Greatest absolute difference of latents between our sampler and the folder, loaded afresh by plain diffusers.

    Text goes through the folder's own encoders on one side and through `encode` on the other, so that the whole path
    from prompt to latents is compared.

    Raises:
        DataError: the difference is above TOLERANCE or not a number.
    """
    _no_bars()
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(network.device)
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = torch.randn(len(PROBES), *backbone.latent_shape).to(network.device)
        torch.manual_seed(seed)  # diffusers renoises from torch's global generator, which we then follow draw by draw
        theirs = pipe(
            list(PROBES), num_inference_steps=steps, guidance_scale=backbone.plain_guidance, output_type="latent",
            height=backbone.resolution, width=backbone.resolution, latents=backbone.to_pipeline(start.clone()),
        ).images  # fmt: skip
        torch.manual_seed(seed)
        like = backbone.to_pipeline(start)
        noises = torch.stack([start, *(backbone.from_pipeline(torch.randn_like(like)) for _ in range(steps - 1))])
    items, _ = backbone.encode(list(PROBES))
    times = backbone.student_times(steps).to(network.device)
    ours = student_sample(backbone, network, backbone.collate(items), times, noises)
    difference = (ours - backbone.from_pipeline(theirs)).abs().max().item()
    if not difference <= TOLERANCE:
        raise DataError(
            f"the exported folder does not draw the student's images: latents differ by {difference:.2e}, allowed "
            f"{TOLERANCE:.0e}; check that diffusers is the version DMDR is installed with, then export again"
        )
    return difference


def _no_bars() -> None:
    """Both libraries draw a bar for each part that they read or write, whatever the log is."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
