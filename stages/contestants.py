"""Who may be compared: the student as exported, the teacher, the naive teacher, the student after cold start alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dmdr import teacher
from dmdr.backbones import Backbone, Conditioning
from dmdr.config import Config
from dmdr.export import load_student
from dmdr.metrics.scorecard import Model
from dmdr.rollout import student_sample, teacher_sample

# (conditioning of B images, noises (N, B, C, H, W)) -> x0 latents (B, C, H, W)
Sampler = Callable[[Conditioning, torch.Tensor], torch.Tensor]


def models(config: Config, backbone: Backbone) -> list[Model]:
    """The columns of the scorecard, in the order of `evaluate.models`. The naive teacher has the student's NFE."""
    steps, teacher = config.student.steps, config.teacher
    known = {name: Model(name, steps, 1.0) for name in ("student", "naive teacher", "cold start")}
    known["teacher"] = Model("teacher", teacher.steps, teacher.guidance_scale, backbone.guidance_is_input)
    return [known[name] for name in config.evaluate.models]


def sampler(
    config: Config, backbone: Backbone, model: Model, *, unconditional: Conditioning, made: Callable[..., Path]
) -> Sampler:
    """How a model draws; a student's network is loaded here, and goes when the sampler goes, so that at most two are
    in memory: the teacher's and one student's.

    made: (stage, under) -> the folder with what a stage sealed under such names.
    """
    device = str(backbone.network.device)
    if model.name in ("teacher", "naive teacher"):
        times = backbone.teacher_times(model.steps).to(device)
        return lambda c, noises: teacher_sample(
            backbone, c, unconditional, guidance_scale=model.guidance_scale, times=times, noise=noises[0]
        )
    if model.name == "student":
        network = teacher.load(made("export", "pipeline/") / "pipeline", device, text=False).network
    else:
        network = teacher.load(teacher.source(config.teacher), device, text=False).network
        load_student(network, made("cold_start"))
    times = backbone.student_times(model.steps).to(device)
    return lambda c, noises: student_sample(backbone, network, c, times, noises)
