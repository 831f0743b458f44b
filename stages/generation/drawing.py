"""Draw a prompt with a run's student, and with its teacher beside it, each in the pipeline that a user has.

1. Each image has its own seed and does not depend on how many are drawn. Student and teacher start from the same
   noise, because their pipelines draw it alike from that seed.
2. Images are drawn one by one and timed. Where models are compared, each draws once before the clock runs.
3. On a GPU everything runs in the dtype of the exported files, on a CPU in float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dmdr.backbones.latent import silence_diffusers
from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.config.guidance import take_middle
from dmdr.config.inputs import Teacher
from dmdr.config.run import Config
from dmdr.errors import DataError, NonFinite
from dmdr.export.rounding import DTYPES
from dmdr.export.write import disable_progress_bars, fill_student
from dmdr.metrics.scorecard import Model
from dmdr.teacher.load import TeacherSource, load_teacher
from stages.generation.source import StudentSource, find_teacher_of_run, read_export, read_weights
from stages.reports.export_facts import CallFacts
from stages.store.artifacts import Artifact

UNEXPORTED = torch.bfloat16  # in which a student that has no files yet runs on a GPU


@dataclass(frozen=True)
class DrawingModel:
    """A pipeline and the arguments of its call. model: its name, steps and NFE."""

    model: Model
    pipe: DiffusionPipeline
    call: CallFacts


@dataclass(frozen=True)
class Drawn:
    """One image and how long it took."""

    image: Image.Image
    seconds: float


def load_models(
    source: StudentSource, config: Config | None, cache: Path, *, compare: bool
) -> tuple[DrawingModel, DrawingModel | None]:
    """Load the student, and the teacher if they are compared, on the GPU if there is one.

    config: the run's, where the store cannot know where the teacher lies. cache: for files of a remote store.

    Raises:
        InputMissing, DataError: a part is missing, damaged, or of another teacher.
    """
    disable_progress_bars()
    is_export = source.stage == "export"
    teacher = find_teacher_of_run(source, config) if compare or not is_export else None
    if is_export:
        student, dtype = load_exported(source, cache)
    else:
        assert teacher is not None
        student, dtype = load_unexported(source, teacher), UNEXPORTED
    move_to_device(student.pipe, dtype)
    if teacher is None or not compare:
        return student, None
    other = load_teacher_model(source, teacher, config, size=student.call.height)
    move_to_device(other.pipe, dtype)
    return student, other


def load_exported(source: StudentSource, cache: Path) -> tuple[DrawingModel, torch.dtype]:
    """The exported pipeline as a user loads it, and the dtype of its files."""
    folder, facts = read_export(source, cache)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())[:300]
        raise DataError(f"{folder} does not load: {message}; export the run again") from error
    return DrawingModel(Model("student", facts.nfe, 1.0), pipe, facts.call), DTYPES[facts.dtype]


def load_unexported(source: StudentSource, teacher: TeacherSource) -> DrawingModel:
    """The teacher's pipeline with the student's network and scheduler, as it would be exported now."""
    backbone = load_teacher(teacher, resolution=_read_resolution(source))
    fill_student(backbone.network, read_weights(source), is_lora=source.is_lora, where=source.artifact.address)
    few = source.few_steps
    pipe = backbone.build_student_pipeline(backbone.network, few)
    return DrawingModel(Model("student", few.steps, 1.0), pipe, build_call(backbone, few))


def build_call(backbone: Backbone, few: FewSteps) -> CallFacts:
    """The arguments of a student's pipeline."""
    return CallFacts.model_validate(
        {
            "num_inference_steps": few.steps,
            "guidance_scale": backbone.plain_guidance,
            "height": backbone.resolution,
            "width": backbone.resolution,
            **backbone.student_arguments(few),
        }
    )


def load_teacher_model(
    source: StudentSource, teacher: TeacherSource, config: Config | None, *, size: int
) -> DrawingModel:
    """The teacher's own pipeline, with the steps and the guidance scale that the run compares it at.

    size: of its images in pixels a side, the student's.
    """
    backbone = load_teacher(teacher, resolution=size)
    guidance = read_guidance(source.settings["teacher.guidance_scale"])
    evaluated = Artifact(source.artifact.store, source.artifact.run, "evaluate").read_claim()
    known = evaluated.identity.get("teacher.steps") if evaluated else None
    steps = config.teacher.steps if config else int(str(known or Teacher.model_fields["steps"].default))
    call = CallFacts(
        num_inference_steps=steps,
        guidance_scale=guidance + backbone.plain_guidance - 1,  # Z-Image's own scale is less by 1
        height=size,
        width=size,
    )
    return DrawingModel(Model("teacher", steps, guidance, backbone.guidance_is_input), backbone.pipe, call)


def read_guidance(setting: object) -> float:
    """The guidance scale of evaluation, from the setting in a result's identity: a number, or a range as a list."""
    if isinstance(setting, list):
        low, high = (float(str(each)) for each in setting)
        return take_middle((low, high))
    return float(str(setting))


def move_to_device(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Move a pipeline to the GPU in this dtype, if there is a GPU."""
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        with silence_diffusers():
            pipe.to("cuda", dtype)


def _read_resolution(source: StudentSource) -> int | None:
    resolution = source.settings.get("teacher.resolution")
    return None if resolution is None else int(str(resolution))


def draw_image(drawing: DrawingModel, prompt: str, seed: int) -> Drawn:
    """One image, from this seed alone.

    Raises:
        NonFinite: the image is not a number.
    """
    began = time.monotonic()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)  # diffusers' flow scheduler renoises from torch's global generator
        pixels: torch.Tensor = drawing.pipe(  # type: ignore[operator]  # each family's pipeline can be called
            prompt,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **drawing.call.list_arguments(),
        ).images[0]
    pixels = pixels.float().cpu()
    seconds = time.monotonic() - began
    if not pixels.isfinite().all():
        raise NonFinite(f"{drawing.model.name} drew an image that is not a number; train it again, more slowly")
    return Drawn(to_picture(pixels), seconds)


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as 8 bits."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def warm_up(drawing: DrawingModel, prompt: str) -> None:
    """Let a model draw once, in few steps, so that what only its first image takes is not measured."""
    quick = drawing.call
    if quick.num_inference_steps > 4:  # a teacher's, which names no times
        quick = quick.model_copy(update={"num_inference_steps": 4})
    draw_image(DrawingModel(drawing.model, drawing.pipe, quick), prompt, 0)
