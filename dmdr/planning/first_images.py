"""Draw a teacher's first images, decode them, and let every reward and metric judge them, before anyone pays.

1. The teacher draws as evaluation draws it, from prompts that are encoded already. On a CPU that would take minutes
   an image, it takes fewer steps, and says how many.
2. The decoder is tried in the dtype of the exported files, too: some overflow in float16, and draw black images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmdr.backbones.latent import silence_diffusers
from dmdr.backbones.protocol import Backbone, Conditioning, Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.reward_weights import VERIFIERS
from dmdr.config.run import Config
from dmdr.errors import doing
from dmdr.export.rounding import DTYPES
from dmdr.metrics.load import judge_images, load_metrics
from dmdr.metrics.protocol import Metric
from dmdr.metrics.reward import RewardMetric
from dmdr.noise import noise_for
from dmdr.promptset.prompts import Prompts
from dmdr.rewards.load import load_reward
from dmdr.rewards.sources import list_sources
from dmdr.rollout import sample_student, sample_teacher

FEWEST = 4  # steps of a teacher that are drawn however long they take


@dataclass(frozen=True)
class Images:
    """Images (B, H, W, 3) uint8 of one model, and for each whether all its values were numbers."""

    pixels: np.ndarray
    are_finite: tuple[bool, ...]


@dataclass(frozen=True)
class FirstImages:
    """What was drawn. steps: of the teacher. exported: its images, decoded in the dtype of the exported files.

    scores: figure -> mean over the teacher's images; None is not a number. missing: metric -> why it was not loaded.
    """

    steps: int
    teacher: Images
    student: Images
    exported: Images
    scores: Mapping[str, float | None]
    missing: Mapping[str, str]


@torch.no_grad()
def draw_first_images(
    config: Config, backbone: Backbone, *, prompts: Prompts, empty_prompt: Item, limit: float
) -> FirstImages:
    """Draw an image of each prompt with the teacher, and with the student as it begins, and judge the teacher's.

    prompts: of evaluation. empty_prompt: its conditioning. limit: seconds that drawing by the teacher may take.

    Raises:
        ConfigError, DataError, InputMissing: a reward or metric does not load, or cannot judge these prompts.
    """
    indices, device = list(range(len(prompts))), backbone.network.device
    records, c = prompts.records(indices), backbone.collate(prompts.items(indices))
    shape = (config.student.steps, len(indices), *backbone.latent_shape)
    noises = noise_for(config.seed, "first images", shape=shape).to(device)
    steps = _choose_steps(config, backbone, c, noises[0], limit)
    latents = sample_teacher(
        backbone,
        c,
        backbone.collate([empty_prompt]),
        guidance_scale=config.teacher.guidance,
        times=backbone.teacher_times(steps).to(device),
        noise=noises[0],
    )
    few = config.student.few_steps
    times = backbone.student_times(few).to(device)
    student = sample_student(backbone, backbone.network, c, times=times, noises=noises, eta=few.drawn_eta)
    images = backbone.decode(latents).float()
    metrics, missing = load_judges(config, records, str(device))
    return FirstImages(
        steps,
        teacher=_to_images(images),
        student=_to_images(backbone.decode(student)),
        exported=_to_images(decode_in(backbone, latents, DTYPES[config.export.dtype])),
        scores=judge(metrics, images, records),
        missing=missing,
    )


def _choose_steps(config: Config, backbone: Backbone, c: Conditioning, noise: torch.Tensor, limit: float) -> int:
    """The teacher's steps, or as many of them as take `limit` seconds by the time of one evaluation, at least a few."""
    t = torch.ones(len(noise), device=noise.device)
    for _ in range(2):  # the first one warms up
        began = time.monotonic()
        backbone.predict(backbone.network, noise, t, c).sum().item()
        seconds = time.monotonic() - began
    nfe = 2 if config.teacher.guidance > 1 else 1
    return min(config.teacher.steps, max(FEWEST, int(limit / max(nfe * seconds, 1e-9))))


@torch.no_grad()
def decode_in(backbone: Backbone, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode latents as diffusers does it for someone who loads the files in this dtype."""
    vae = backbone.vae
    if dtype == torch.float16 and vae.config.get("force_upcast", False) and backbone.family == "sdxl":
        return backbone.decode(latents)  # its pipeline decodes in float32 then
    with silence_diffusers():  # which warns of a cast that we want
        rounded = copy.deepcopy(vae).to(dtype=dtype)  # type: ignore[call-arg]  # diffusers' wrapper hides that `to` is a method
    return backbone.decode_by(rounded, latents).float()


def load_judges(config: Config, records: list[PromptRecord], device: str) -> tuple[list[Metric], dict[str, str]]:
    """Every metric of evaluation and every reward of training but the verifiers, which judge training prompts
    alone; and the metrics that lack their weights."""
    loaded = load_metrics(config.evaluate.metrics, records, device, list_sources(config))
    only_trained = config.list_training_rewards().difference(config.evaluate.metrics, VERIFIERS)
    rewards = [RewardMetric(load_reward(name, device, list_sources(config))) for name in sorted(only_trained)]
    return [*loaded.metrics, *rewards], loaded.missing


def judge(metrics: Sequence[Metric], images: torch.Tensor, records: list[PromptRecord]) -> dict[str, float | None]:
    """Figure -> mean over the images that it judges; None is not a number. A figure that judges none is left out."""
    means: dict[str, float | None] = {}
    for metric in metrics:
        judged = [metric.judges(record) for record in records]
        with doing(f"judging images with {', '.join(metric.figures)}"):
            scores, _ = judge_images(metric, images, records)
        for figure, values in scores.items():
            if any(judged):
                mean = float(values[judged].mean())
                means[figure] = mean if np.isfinite(mean) else None
    return means


def _to_images(images: torch.Tensor) -> Images:
    """Images (B, 3, H, W) in [0, 1] as bytes."""
    are_finite = tuple(images.isfinite().flatten(1).all(dim=1).tolist())
    rounded = (images.float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return Images(rounded.permute(0, 2, 3, 1).cpu().numpy(), are_finite)
