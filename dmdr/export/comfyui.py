"""A ComfyUI workflow that draws a form of the student: its loaders, its sampler and the numbers of a call.

1. The file is a prompt as ComfyUI's server takes it (its "API format"), which its page opens as well.
2. Its sampler `lcm` is ours: predict x0, then renoise it with fresh noise to the next sigma. A deterministic student is
   sampled by `euler`. Its scheduler `simple` takes every (1000 / N)th sigma from the noisiest on. After a shift those
   are the student's times in every family; a student with other timesteps gets no workflow.
3. SDXL has no such shift: ComfyUI knows one noise schedule. A teacher of another one gets no workflow, and neither does
   one that predicts v.
4. cfg 1 runs no second forward, so that the negative prompt does not matter. FLUX.1 takes its scale as an input.
5. The file of the teacher has a name that only its user can know. Its node says what belongs there.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.backbones.sdxl import SDXL
from dmdr.config.few_steps import FewSteps
from dmdr.export.write import absent_text_encoders

SCHEDULER = "simple"
TIMESTEPS, BETAS = 1000, (0.00085, 0.012)  # of ComfyUI's SDXL: linear in the square root
TOLERANCE = 2e-3  # of times and sigmas; the pages of ComfyUI round a shift to two digits
CLIP_L, CLIP_G, T5 = "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"  # as ComfyUI publishes them
QWEN, AUTOENCODER = "qwen_3_4b.safetensors", "ae.safetensors"

Link = list[str | int]  # the node that a value comes from, and which of its outputs
Value = str | int | float | Link


class Meta(TypedDict):
    """What the page shows of a node besides its inputs."""

    title: str


class Node(TypedDict):
    """A node of a workflow."""

    class_type: str
    inputs: dict[str, Value]
    _meta: Meta


Workflow = dict[str, Node]  # by a name that links use


def build_workflow(
    form: str, backbone: Backbone, few: FewSteps, *, title: str, teacher: str, prompt: str
) -> Workflow | None:
    """The workflow of a form; None for the form `pipeline`, or if ComfyUI cannot sample the teacher's noise schedule.

    title: the run's name, and that of the files. teacher: its name.
    """
    if form == "pipeline" or not samples_alike(backbone, few):
        return None
    nodes = _Nodes()
    parts = _load(nodes, form, backbone, title, teacher)
    side: dict[str, Value] = {"width": backbone.resolution, "height": backbone.resolution}
    model = _shift(nodes, parts.model, backbone, few)
    positive = nodes.add("prompt", "CLIPTextEncode", {"text": prompt, "clip": parts.clip})
    negative = nodes.add("no negative prompt", "ConditioningZeroOut", {"conditioning": positive})
    if backbone.guidance_is_input:
        positive = nodes.add("guidance", "FluxGuidance", {"conditioning": positive, "guidance": 1.0})
    latent_class = "EmptyLatentImage" if backbone.family == "sdxl" else "EmptySD3LatentImage"
    latent = nodes.add("size", latent_class, {**side, "batch_size": 1})
    sampled = nodes.add(
        "sampler",
        "KSampler",
        {
            "model": model,
            "seed": 0,
            "steps": few.steps,
            "cfg": 1.0,
            "sampler_name": "lcm" if few.is_stochastic else "euler",
            "scheduler": SCHEDULER,
            "positive": positive,
            "negative": negative,
            "latent_image": latent,
            "denoise": 1.0,
        },
    )
    image = nodes.add("image", "VAEDecode", {"samples": sampled, "vae": parts.vae})
    nodes.add("saved image", "SaveImage", {"images": image, "filename_prefix": title})
    return nodes.workflow


def samples_alike(backbone: Backbone, few: FewSteps) -> bool:
    """Whether ComfyUI's sigmas, with the shift that the workflow sets, are those of the student."""
    times = backbone.student_times(few)[:-1]
    if not isinstance(backbone, SDXL):
        shifted = shift_times(few.steps, find_shift(times))
        return bool((times - shifted).abs().max() <= TOLERANCE)
    signal, spread = backbone.path.signal_and_spread(times)
    if backbone.path.timesteps != TIMESTEPS or backbone.path.predicts != "epsilon":
        return False
    sigmas = list_sdxl_sigmas(few.steps)
    return bool((spread / signal / sigmas - 1).abs().max() <= TOLERANCE)


def find_shift(times: torch.Tensor) -> float:
    """The shift s of times s u / (1 + (s - 1) u), u = 1 - k / N, from the second of N times. 1 if N is 1."""
    steps = len(times)
    if steps == 1:
        return 1.0
    even, t = 1 - 1 / steps, times[1].item()
    return round(t * (1 - even) / (even * (1 - t)), 3)


def shift_times(steps: int, shift: float) -> torch.Tensor:
    """(steps,) what ComfyUI's flow models sample at by `simple`."""
    even = 1 - torch.arange(steps) / steps
    return shift * even / (1 + (shift - 1) * even)


def list_sdxl_sigmas(steps: int) -> torch.Tensor:
    """(steps,) what ComfyUI's SDXL samples at by `simple`: spread / signal at every (1000 / N)th timestep."""
    start, end = (math.sqrt(beta) for beta in BETAS)
    betas = torch.linspace(start, end, TIMESTEPS, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)
    sigmas = ((1 - signal) / signal).sqrt()
    return torch.stack([sigmas[TIMESTEPS - 1 - k * TIMESTEPS // steps] for k in range(steps)])


class _Nodes:
    """A workflow while it is put together."""

    def __init__(self) -> None:
        self.workflow: Workflow = {}

    def add(self, title: str, class_type: str, inputs: dict[str, Value]) -> Link:
        """Add a node; returns the link to its first output."""
        key = str(len(self.workflow) + 1)
        self.workflow[key] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
        return [key, 0]


class _Loaded(NamedTuple):
    """The links to a network, its text encoders and its autoencoder."""

    model: Link
    clip: Link
    vae: Link


def _load(nodes: _Nodes, form: str, backbone: Backbone, title: str, teacher: str) -> _Loaded:
    """Add the loaders of a form."""
    file = f"{title}.safetensors"
    if form == "single-file":
        return _load_checkpoint(nodes, f"{title}: put the file into models/checkpoints", file)
    base = _load_teacher(nodes, backbone, teacher)
    if form == "lora":
        model = nodes.add(
            f"{title}: put the LoRA into models/loras under this name",
            "LoraLoaderModelOnly",
            {"model": base.model, "lora_name": file, "strength_model": 1.0},
        )
    else:
        model = nodes.add(
            f"{title}: put the weights into models/diffusion_models under this name",
            "UNETLoader",
            {"unet_name": file, "weight_dtype": "default"},
        )
    return base._replace(model=model)


def _load_teacher(nodes: _Nodes, backbone: Backbone, teacher: str) -> _Loaded:
    name = teacher.removeprefix("hub:").partition("@")[0].rpartition("/")[2].removeprefix("lab:")
    file, title = f"{name.removesuffix('.safetensors')}.safetensors", f"the teacher {teacher}: choose your file of it"
    if backbone.family == "sdxl":
        return _load_checkpoint(nodes, title, file)
    if backbone.family == "sd3":  # whose published files may come without text encoders
        return _load_checkpoint(nodes, title, file)._replace(clip=_load_sd3_encoders(nodes, backbone))
    model = nodes.add(title, "UNETLoader", {"unet_name": file, "weight_dtype": "default"})
    if backbone.family == "flux":
        clip = nodes.add("text encoders", "DualCLIPLoader", {"clip_name1": CLIP_L, "clip_name2": T5, "type": "flux"})
    else:
        clip = nodes.add("text encoder", "CLIPLoader", {"clip_name": QWEN, "type": "lumina2"})
    return _Loaded(model, clip, nodes.add("autoencoder", "VAELoader", {"vae_name": AUTOENCODER}))


def _load_checkpoint(nodes: _Nodes, title: str, file: str) -> _Loaded:
    key = nodes.add(title, "CheckpointLoaderSimple", {"ckpt_name": file})[0]
    return _Loaded([key, 0], [key, 1], [key, 2])


def _load_sd3_encoders(nodes: _Nodes, backbone: Backbone) -> Link:
    names: dict[str, Value] = {"clip_name1": CLIP_L, "clip_name2": CLIP_G}
    if absent_text_encoders(backbone):
        return nodes.add("text encoders", "DualCLIPLoader", {**names, "type": "sd3"})
    return nodes.add("text encoders", "TripleCLIPLoader", {**names, "clip_name3": T5})


def _shift(nodes: _Nodes, model: Link, backbone: Backbone, few: FewSteps) -> Link:
    """Add the node that gives the network the student's times."""
    if backbone.family == "sdxl":
        return model
    shift = find_shift(backbone.student_times(few)[:-1])
    if backbone.family == "flux":  # its node takes logarithms, one for few image tokens and one for many
        mu = round(math.log(shift), 4)
        side = backbone.resolution
        inputs: dict[str, Value] = {"max_shift": mu, "base_shift": mu, "width": side, "height": side}
        return nodes.add("the student's times", "ModelSamplingFlux", {"model": model, **inputs})
    kind = "ModelSamplingSD3" if backbone.family == "sd3" else "ModelSamplingAuraFlow"
    return nodes.add("the student's times", kind, {"model": model, "shift": shift})
