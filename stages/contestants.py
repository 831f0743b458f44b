"""Who may be compared: the student as exported, the teacher, the naive teacher, the student after cold start alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dmdr import teacher
from dmdr.backbones import Backbone, Conditioning
from dmdr.config import Config
from dmdr.export import load_student
from dmdr.metrics.scorecard import Model
from dmdr.rollout import student_sample, teacher_sample


@dataclass(frozen=True)
class Contestant:
    """sample: (conditioning of B prompts, noises (N, B, C, H, W)) -> x0 latents (B, C, H, W)."""

    model: Model
    sample: Callable[[Conditioning, torch.Tensor], torch.Tensor]


def models(config: Config, backbone: Backbone) -> list[Model]:
    """The columns of the scorecard, in the order of `evaluate.models`. The naive teacher has the student's NFE."""
    steps, teacher = config.student.steps, config.teacher
    known = {name: Model(name, steps, 1.0) for name in ("student", "naive teacher", "cold start")}
    known["teacher"] = Model("teacher", teacher.steps, teacher.guidance_scale, backbone.guidance_is_input)
    return [known[name] for name in config.evaluate.models]


def contestants(
    config: Config, backbone: Backbone, *, unconditional: Conditioning, made: Callable[..., Path]
) -> Iterator[Contestant]:
    """The contestants in the order of `models`. A network is loaded when its turn comes and let go after it, so that at
    most two are in memory: the teacher's and one student's.

    made: (stage, under) -> the folder with what a stage sealed under such names, asked for when its model's turn comes.
    """
    device = str(backbone.network.device)

    def few_steps(model: Model, network: torch.nn.Module) -> Contestant:
        times = backbone.student_times(model.steps).to(device)
        return Contestant(model, lambda c, noises: student_sample(backbone, network, c, times, noises))

    def many_steps(model: Model) -> Contestant:
        times = backbone.teacher_times(model.steps).to(device)

        def sample(c: Conditioning, noises: torch.Tensor) -> torch.Tensor:
            return teacher_sample(
                backbone, c, unconditional, guidance_scale=model.guidance_scale, times=times, noise=noises[0]
            )

        return Contestant(model, sample)

    for model in models(config, backbone):
        if model.name == "student":
            folder = made("export", "pipeline/") / "pipeline"
            yield few_steps(model, teacher.load(folder, device, text=False).network)
        elif model.name == "cold start":
            network = teacher.load(teacher.source(config.teacher), device, text=False).network
            load_student(network, made("cold_start"))
            yield few_steps(model, network)
            del network
        else:
            yield many_steps(model)
