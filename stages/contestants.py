"""Who is compared: the student as exported, the teacher, the naive teacher, and the student after cold start alone."""

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


def models(config: Config, cold_start: bool) -> list[Model]:
    """The columns of the scorecard, the student first. The naive teacher has the student's NFE."""
    steps = config.student.steps
    compared = [
        Model("student", steps, 1.0),
        Model("teacher", config.teacher.steps, config.teacher.guidance_scale),
        Model("naive teacher", steps, 1.0),
    ]
    return [*compared, Model("cold start", steps, 1.0)] if cold_start else compared


def contestants(
    config: Config, backbone: Backbone, *, unconditional: Conditioning, exported: Path, cold_start: Path | None
) -> Iterator[Contestant]:
    """The contestants in the order of `models`. A network is loaded when its turn comes and let go after it, so that at
    most two are in memory: the teacher's and one student's.

    exported: the diffusers folder of the export. cold_start: the output of cold start.
    """
    device = str(backbone.network.device)
    compared = models(config, cold_start is not None)

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

    yield few_steps(compared[0], teacher.load(exported, device, text=False).network)
    yield many_steps(compared[1])
    yield many_steps(compared[2])
    if cold_start is not None:
        network = teacher.load(teacher.resolve(config.teacher.path), device, text=False).network
        load_student(network, cold_start)
        yield few_steps(compared[3], network)
