"""The models that may be compared: the student as exported, the teacher, the naive teacher, the student after its cold
start alone, what the student started from, and any pipeline of diffusers."""

from __future__ import annotations

from dmdr.backbones.protocol import Backbone, Conditioning
from dmdr.config.run import Config
from dmdr.export.write import load_student
from dmdr.metrics.scorecard import Model
from dmdr.rollout import sample_student, sample_teacher
from dmdr.teacher.load import find_teacher_of, load_network, load_teacher
from dmdr.teacher.start_files import find_start
from dmdr.teacher.start_weights import turn_into_start
from stages.evaluation import third_party
from stages.evaluation.batch import Sampler
from stages.runtime.context import Context


def list_models(config: Config, backbone: Backbone) -> list[Model]:
    """The columns of the scorecard: `evaluate.models`, then `evaluate.pipelines`, in their order. The naive teacher has
    the student's NFE."""
    steps, teacher = config.student.steps, config.teacher
    known = {name: Model(name, steps, 1.0) for name in ("student", "naive teacher", "cold start", "start")}
    known["teacher"] = Model("teacher", teacher.steps, teacher.guidance, backbone.guidance_is_input)
    others = [third_party.build_model(name, pipeline) for name, pipeline in config.evaluate.pipelines.items()]
    return [*(known[name] for name in config.evaluate.models), *others]


def build_sampler(context: Context, backbone: Backbone, model: Model, *, unconditional: Conditioning) -> Sampler:
    """The function that draws with a model.

    A student's network is loaded here and freed with the sampler, so that at most two networks are in memory: the
    teacher's and one student's.

    Raises:
        DataError: a network or a third party's pipeline does not load.
    """
    config = context.config
    if model.name in config.evaluate.pipelines:
        return third_party.build_sampler(model.name, config.evaluate.pipelines[model.name], backbone)
    if model.name in ("teacher", "naive teacher"):
        return _build_teacher_sampler(backbone, model, unconditional)
    return _build_student_sampler(context, backbone, model)


def _build_teacher_sampler(backbone: Backbone, model: Model, unconditional: Conditioning) -> Sampler:
    times = backbone.teacher_times(model.steps).to(backbone.network.device)
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


def _build_student_sampler(context: Context, backbone: Backbone, model: Model) -> Sampler:
    device = str(backbone.network.device)
    if model.name == "student":
        network = load_network(context.input("export", "pipeline/") / "pipeline", device)
    else:
        teacher = load_teacher(find_teacher_of(context.config.teacher), device, text=False)
        network, start = teacher.network, context.config.student.start
        if model.name == "start":
            assert start is not None, "the config refuses a model that is not there"
            source = find_start(start, context.config.student.form)
            turn_into_start(network, source, type(teacher.pipe), scale=start.scale)
        else:
            load_student(network, context.input("cold_start"))
    few = context.config.student.few_steps
    times = backbone.student_times(few).to(device)
    return lambda batch: backbone.decode(
        sample_student(backbone, network, batch.c, times=times, noises=batch.noises, eta=few.drawn_eta)
    )
