"""Prove that an exported form draws the student's images: plain diffusers loads it, and we compare the latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from dmdr.backbones.latent import silence_diffusers
from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.errors import DataError
from dmdr.export.write import absent_text_encoders, disable_progress_bars, network_part
from dmdr.noise import noise_for
from dmdr.rollout import sample_student
from dmdr.teacher.load import TeacherSource, load_pipeline

PROBES = ("a red circle", "two blue squares above a green cross", "a photo of three trees")
# Greatest absolute difference of latents, whose standard deviation is about 1. float32 leaves 1e-5, and 1.5e-4 in a
# student that RL alone has moved far; a wrong scheduler or weight leaves 0.1 and more.
TOLERANCE = 1e-3


def load_form(form: str, folder: Path, backbone: Backbone, source: TeacherSource, few: FewSteps) -> DiffusionPipeline:
    """Load the pipeline of a form under `folder` from the disk, in float32, with no code of ours.

    source: the teacher, which gives the forms `lora` and `weights` their other parts.
    """
    disable_progress_bars()
    if form == "pipeline":
        return DiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32, local_files_only=True)
    if form == "single-file":
        (file,) = (folder / "single-file").glob("*.safetensors")
        absent = dict.fromkeys(absent_text_encoders(backbone))
        whole: DiffusionPipeline = backbone.pipe.from_single_file(
            str(file), config=str(folder / "pipeline"), dtype=torch.float32, local_files_only=True, **absent
        )
        for part in whole.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # diffusers leaves T5 with its dropout on
        return whole
    pipe = load_pipeline(source)
    scheduler = type(backbone.student_scheduler(few))
    pipe.register_modules(scheduler=scheduler.from_pretrained(folder / form / "scheduler", local_files_only=True))
    if form == "lora":
        with silence_diffusers():
            pipe.load_lora_weights(folder / "lora", local_files_only=True)
    else:
        kind = type(backbone.network)
        network = kind.from_pretrained(folder / "weights", dtype=torch.float32, local_files_only=True)
        pipe.register_modules(**{network_part(backbone): network})
    return pipe


@torch.no_grad()
def compare_latents(
    backbone: Backbone, network: ModelMixin, few: FewSteps, pipe: DiffusionPipeline, *, seed: int
) -> float:
    """The greatest absolute difference of latents between our sampler and a form's pipeline.

    One side encodes the prompts by the form's own encoders, the other by `encode`, so that the whole way from prompt to
    latents is compared.

    Raises:
        DataError: the difference is above TOLERANCE or not a number.
    """
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(), silence_diffusers():  # it warns of prompts that it cuts, and of a dtype that is given
        pipe.to(network.device)
        torch.manual_seed(seed)
        start = torch.randn(len(PROBES), *backbone.latent_shape).to(network.device)
        torch.manual_seed(seed)  # diffusers renoises from torch's global generator, whose draws we repeat below
        theirs = pipe(  # type: ignore[operator]  # each family's pipeline can be called; their base class cannot
            list(PROBES),
            num_inference_steps=few.steps,
            guidance_scale=backbone.plain_guidance,
            output_type="latent",
            height=backbone.resolution,
            width=backbone.resolution,
            latents=backbone.to_pipeline(start.clone()),
            **backbone.student_arguments(few),
        ).images
        torch.manual_seed(seed)
        like = backbone.to_pipeline(start)
        noises = torch.stack([start, *(backbone.from_pipeline(torch.randn_like(like)) for _ in range(few.steps - 1))])
    items, _ = backbone.encode(list(PROBES))
    times = backbone.student_times(few).to(network.device)
    c = backbone.collate(items)
    ours = sample_student(backbone, network, c, times=times, noises=noises, eta=few.drawn_eta)
    difference = (ours - backbone.from_pipeline(theirs)).abs().max().item()
    if not difference <= TOLERANCE:
        raise DataError(
            f"the export does not draw the student's images: latents differ by {difference:.2e}, allowed "
            f"{TOLERANCE:.0e}; check that diffusers is the version DMDR is installed with, then export again"
        )
    return difference


def sample_probes(backbone: Backbone, few: FewSteps, *, seed: int) -> torch.Tensor:
    """The latents (B, C, H, W) that the backbone's network, a student, draws of PROBES: the same noise for one seed."""
    device = backbone.network.device
    shape = (few.steps, len(PROBES), *backbone.latent_shape)
    c = backbone.collate(backbone.encode(list(PROBES))[0])
    times = backbone.student_times(few).to(device)
    noises = noise_for(seed, "probes", shape=shape).to(device)
    return sample_student(backbone, backbone.network, c, times=times, noises=noises, eta=few.drawn_eta)


def measure_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root mean square difference of latents, whose standard deviation is about 1."""
    return (one - other).square().mean().sqrt().item()
