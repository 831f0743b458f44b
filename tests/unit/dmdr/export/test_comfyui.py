"""The workflow against the facts of ComfyUI: its nodes' inputs, and the sigmas and steps that it computes from them.

Facts, of Comfy-Org/ComfyUI: nodes.py at 02217e3, comfy_extras/nodes_model_advanced.py at 691e827,
comfy/model_sampling.py at 2fd2083, comfy/samplers.py (simple_scheduler), comfy/k_diffusion/sampling.py (sample_lcm):
1. A node must have its required inputs; a link has to come from an output of the input's type.
2. simple_scheduler takes sigmas[-(1 + int(k * len(sigmas) / steps))] of the model's own table, and a final 0.
3. ModelSamplingDiscreteFlow: 1000 sigmas s t / (1 + (s - 1) t), t = 1/1000 ... 1; of SD3 and AuraFlow.
   ModelSamplingFlux: 10000 sigmas e^mu / (e^mu + 1/t - 1), mu linear in the number of pixels between its two shifts.
   ModelSamplingDiscrete (SDXL): sqrt((1 - a) / a) of 1000 betas, linear in the square root from 0.00085 to 0.012.
4. sample_lcm: x = denoised; if the next sigma is above 0, x = noise_scaling(next sigma, noise, x), which is
   (1 - sigma) x + sigma noise for flow, and x + sigma noise for SDXL, whose network sees x / sqrt(1 + sigma^2). The
   first x of SDXL is noise * sqrt(1 + sigma^2).
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from dmdr.config.few_steps import FewSteps
from dmdr.export.comfyui import build_workflow
from dmdr.noise import noise_for
from dmdr.rollout import sample_student
from tests.support.tiny_teachers import copy_teacher

FAMILIES = ("sd3", "sdxl", "z_image", "flux")
COMBO, NUMBER, TEXT = "a file or a choice", "a number", "a text"
INPUTS = {
    "CheckpointLoaderSimple": {"ckpt_name": COMBO},
    "UNETLoader": {"unet_name": COMBO, "weight_dtype": COMBO},
    "VAELoader": {"vae_name": COMBO},
    "CLIPLoader": {"clip_name": COMBO, "type": COMBO},
    "DualCLIPLoader": {"clip_name1": COMBO, "clip_name2": COMBO, "type": COMBO},
    "TripleCLIPLoader": {"clip_name1": COMBO, "clip_name2": COMBO, "clip_name3": COMBO},
    "LoraLoaderModelOnly": {"model": "MODEL", "lora_name": COMBO, "strength_model": NUMBER},
    "ModelSamplingSD3": {"model": "MODEL", "shift": NUMBER},
    "ModelSamplingAuraFlow": {"model": "MODEL", "shift": NUMBER},
    "ModelSamplingFlux": {
        "model": "MODEL",
        "max_shift": NUMBER,
        "base_shift": NUMBER,
        "width": NUMBER,
        "height": NUMBER,
    },
    "CLIPTextEncode": {"text": TEXT, "clip": "CLIP"},
    "ConditioningZeroOut": {"conditioning": "CONDITIONING"},
    "FluxGuidance": {"conditioning": "CONDITIONING", "guidance": NUMBER},
    "EmptyLatentImage": {"width": NUMBER, "height": NUMBER, "batch_size": NUMBER},
    "EmptySD3LatentImage": {"width": NUMBER, "height": NUMBER, "batch_size": NUMBER},
    "KSampler": {
        "model": "MODEL",
        "seed": NUMBER,
        "steps": NUMBER,
        "cfg": NUMBER,
        "sampler_name": COMBO,
        "scheduler": COMBO,
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "latent_image": "LATENT",
        "denoise": NUMBER,
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "SaveImage": {"images": "IMAGE", "filename_prefix": TEXT},
}
OUTPUTS = {
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "VAELoader": ["VAE"],
    "KSampler": ["LATENT"],
    "VAEDecode": ["IMAGE"],
    "SaveImage": [],
    **dict.fromkeys(("UNETLoader", "LoraLoaderModelOnly"), ["MODEL"]),
    **dict.fromkeys(("ModelSamplingSD3", "ModelSamplingAuraFlow", "ModelSamplingFlux"), ["MODEL"]),
    **dict.fromkeys(("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader"), ["CLIP"]),
    **dict.fromkeys(("CLIPTextEncode", "ConditioningZeroOut", "FluxGuidance"), ["CONDITIONING"]),
    **dict.fromkeys(("EmptyLatentImage", "EmptySD3LatentImage"), ["LATENT"]),
}
CHOICES = {
    ("CLIPLoader", "type"): {"lumina2"},
    ("DualCLIPLoader", "type"): {"flux", "sd3", "sdxl"},
    ("UNETLoader", "weight_dtype"): {"default"},
    ("KSampler", "sampler_name"): {"lcm", "euler"},
    ("KSampler", "scheduler"): {"simple", "sgm_uniform", "normal"},
}


def list_sigmas(workflow: dict, *, digits: int | None = None) -> tuple[torch.Tensor, bool]:
    """What ComfyUI samples at, and whether as a flow. digits: those that its page keeps of a shift."""
    (sampler,) = (node["inputs"] for node in workflow.values() if node["class_type"] == "KSampler")
    node = workflow[sampler["model"][0]]
    kind, inputs = node["class_type"], node["inputs"]
    numbers = {name: round(x, digits or 9) for name, x in inputs.items() if isinstance(x, int | float)}
    if kind in ("ModelSamplingSD3", "ModelSamplingAuraFlow"):
        t = torch.arange(1, 1001) / 1000
        table = numbers["shift"] * t / (1 + (numbers["shift"] - 1) * t)
    elif kind == "ModelSamplingFlux":
        slope = (numbers["max_shift"] - numbers["base_shift"]) / (4096 - 256)
        mu = numbers["width"] * numbers["height"] / 256 * slope + numbers["base_shift"] - slope * 256
        t = torch.arange(1, 10001) / 10000
        table = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0)
        table = ((1 - signal) / signal).sqrt()
    steps = sampler["steps"]
    said = [sampler[name] for name in ("sampler_name", "scheduler", "cfg", "denoise")]
    assert said in (["lcm", "simple", 1, 1], ["euler", "simple", 1, 1])
    sigmas = [table[-(1 + int(k * len(table) / steps))].item() for k in range(steps)]
    return torch.tensor([*sigmas, 0.0]), kind.startswith("ModelSampling")


def sample(backbone, c, sampler: str, sigmas: torch.Tensor, noises: torch.Tensor, *, flow: bool) -> torch.Tensor:
    """ComfyUI's samplers `lcm` and `euler` around the same network."""
    x = noises[0] if flow else noises[0] * (1 + sigmas[0] ** 2).sqrt()
    for k, sigma in enumerate(sigmas[:-1]):
        batch = torch.ones(len(x))
        if flow:
            denoised = x - sigma * backbone.predict(backbone.network, x, sigma * batch, c)
        else:
            known = backbone.path.signal_and_spread(torch.arange(1, 1001) / 1000)
            t = ((known[1] / known[0]) / sigma).log().abs().argmin() + 1
            seen = x / (1 + sigma**2).sqrt()
            denoised = x - sigma * backbone.predict(backbone.network, seen, t / 1000 * batch, c)
        following = sigmas[k + 1]
        if sampler == "euler":
            x = x + (x - denoised) / sigma * (following - sigma)
            continue
        x = denoised
        if following > 0:
            x = (1 - following) * x + following * noises[k + 1] if flow else x + following * noises[k + 1]
    return x


def find_sampler(workflow) -> str:
    (sampler,) = (node["inputs"] for node in workflow.values() if node["class_type"] == "KSampler")
    return sampler["sampler_name"]


@pytest.mark.parametrize("form", ["lora", "weights", "single-file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_has_what_comfyui_asks_of_it(family, form, request):
    backbone = copy_teacher(request.getfixturevalue(f"tiny_{family}_folder"), 16)
    built = build_workflow(
        form, backbone, FewSteps(4), title="tiny", teacher="hub:a/base-1.0@" + "0" * 40, prompt='a "red" dress'
    )
    workflow = json.loads(json.dumps(built))
    for node in workflow.values():  # how its page tells this format from the other
        assert set(node) == {"class_type", "inputs", "_meta"}
        asked = INPUTS[node["class_type"]]
        assert node["inputs"].keys() == asked.keys()
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert OUTPUTS[workflow[value[0]]["class_type"]][value[1]] == asked[name]
            else:
                assert isinstance(value, int | float if asked[name] == NUMBER else str)
                assert value in CHOICES.get((node["class_type"], name), {value})
    values = [value for node in workflow.values() for value in node["inputs"].values()]
    assert values.count("tiny.safetensors") == 1
    assert values.count("base-1.0.safetensors") == (form != "single-file")


@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (2, 0.0), (4, 0.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_draws_the_students_latents(family, steps, eta, request):
    """Its sigmas, its steps, its sampler, around our network: the same latents from the same noise."""
    backbone = copy_teacher(request.getfixturevalue(f"tiny_{family}_folder"), 16)
    workflow = build_workflow("lora", backbone, FewSteps(steps, eta), title="tiny", teacher="base", prompt="x")
    sigmas, flow = list_sigmas(workflow)
    times = backbone.student_times(FewSteps(steps))
    if flow:
        assert (sigmas - times).abs().max() < 1e-3
        assert (list_sigmas(workflow, digits=2)[0] - times).abs().max() < 2e-3
    c = backbone.collate(backbone.encode(["a red circle", "a cat"])[0])
    noises = noise_for(0, "comfyui", shape=(steps, 2, *backbone.latent_shape))
    with torch.no_grad():
        theirs = sample(backbone, c, find_sampler(workflow), sigmas, noises, flow=flow)
    ours = sample_student(backbone, backbone.network, c, times=times, noises=noises, eta=eta)
    assert (ours - theirs).abs().max() < 1e-2  # of SD3, whose times diffusers rounds; below 2e-3 for others


def test_timesteps_of_its_own_get_no_workflow(tiny_sd3_folder, tiny_sdxl_folder):
    for folder in (tiny_sd3_folder, tiny_sdxl_folder):
        few = FewSteps(2, timesteps=(900, 300))
        assert build_workflow("lora", copy_teacher(folder), few, title="t", teacher="t", prompt="x") is None


def test_a_noise_schedule_that_comfyui_does_not_know_gets_no_workflow(tiny_sdxl_folder):
    backbone = copy_teacher(tiny_sdxl_folder)
    assert build_workflow("lora", backbone, FewSteps(4), title="t", teacher="t", prompt="x") is not None
    backbone.pipe.scheduler.register_to_config(beta_end=0.02)
    other = type(backbone)(backbone.pipe)
    assert build_workflow("lora", other, FewSteps(4), title="t", teacher="t", prompt="x") is None
    assert build_workflow("pipeline", backbone, FewSteps(4), title="t", teacher="t", prompt="x") is None
