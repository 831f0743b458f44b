"""Who may be compared: the student as exported, the teacher, the naive teacher, the student after cold start alone, and
any pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.config.run import Config
from dmdr.export.write import load_student
from dmdr.metrics.scorecard import Model
from dmdr.rollout import sample_student, sample_teacher
from dmdr.teacher.load import find_teacher_of, load_teacher
from stages.evaluation import third_party
from stages.evaluation.batch import Sampler


def list_models(config: Config, backbone: Backbone) -> list[Model]:
    """The columns of the scorecard: `evaluate.models`, then `evaluate.pipelines`, in their order. The naive teacher has
    the student's NFE."""
    steps, teacher = config.student.steps, config.teacher
    known = {name: Model(name, steps, 1.0) for name in ("student", "naive teacher", "cold start")}
    known["teacher"] = Model("teacher", teacher.steps, teacher.guidance_scale, backbone.guidance_is_input)
    others = [third_party.build_model(name, asked) for name, asked in config.evaluate.pipelines.items()]
    return [*(known[name] for name in config.evaluate.models), *others]


def build_sampler(
    config: Config, backbone: Backbone, model: Model, *, unconditional: Conditioning, made: Callable[..., Path]
) -> Sampler:
    """How a model draws; a student's network is loaded here, and goes when the sampler goes, so that at most two are
    in memory: the teacher's and one student's.

    made: (stage, under) -> the folder with what a stage sealed under such names.
    """
    device = str(backbone.network.device)
    if model.name in config.evaluate.pipelines:
        return third_party.build_sampler(model.name, config.evaluate.pipelines[model.name], backbone)
    if model.name in ("teacher", "naive teacher"):
        times = backbone.teacher_times(model.steps).to(device)
        return lambda batch: backbone.decode(
            sample_teacher(
                backbone,
                batch.c,
                unconditional,
                guidance_scale=model.guidance_scale,
                times=times,
                noise=batch.noises[0],
            )
        )
    if model.name == "student":
        network = load_teacher(made("export", "pipeline/") / "pipeline", device, text=False).network
    else:
        network = load_teacher(find_teacher_of(config.teacher), device, text=False).network
        load_student(network, made("cold_start"))
    times = backbone.student_times(model.steps).to(device)
    return lambda batch: backbone.decode(sample_student(backbone, network, batch.c, times, batch.noises))
