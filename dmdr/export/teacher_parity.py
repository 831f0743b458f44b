"""Prove before training that we draw with a teacher as plain diffusers does: a few small steps of both, compared.

The files of a teacher are checked one by one when it is loaded. This looks at the whole: whatever a file says that we
read in another way shows in the latents. It compares the teacher's own sampling, the decoder, and a few-step student
that is still the teacher, drawn by the pipeline that the export will write.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.errors import DataError
from dmdr.export.parity import compare_latents
from dmdr.noise import noise_for
from dmdr.rollout import sample_teacher

PROMPT = "a red circle"
STEPS = 2
SIDE = 4  # of an image, in smallest ones: all levels of a UNet have something to do
# Greatest absolute difference of latents, whose standard deviation is about 1, and of pixels in [0, 1]. float32 leaves
# 1e-5 on a CPU and 1e-3 where a GPU multiplies in TF32.
TOLERANCE = 1e-2


@torch.no_grad()
def compare_teacher(backbone: Backbone, *, guidance_scale: float, few: FewSteps) -> None:
    """Compare our sampling with the teacher's own pipeline, in float32 and at a small resolution.

    guidance_scale: of the teacher, 1 for none. few: how the student samples.

    Raises:
        DataError: they differ, or the teacher cannot draw.
    """
    try:
        _compare(backbone, guidance_scale, few)
    except (DataError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a library that computes with a value that makes no sense
        message = " ".join(str(error).split())
        raise DataError(
            f"the teacher cannot draw a small image ({type(error).__name__}: {message}); give it as it was published"
        ) from error


def _compare(backbone: Backbone, guidance_scale: float, few: FewSteps) -> None:
    small = type(backbone)(backbone.pipe, min(backbone.resolution, SIDE * backbone.smallest))
    latents, images = draw_by_pipeline(small, guidance_scale)
    ours = draw(small, guidance_scale)
    _require_equal("the teacher's own pipeline", "latents", ours, latents)
    _require_equal("the teacher's own pipeline", "images", small.decode(ours), images)
    student = small.build_student_pipeline(small.network, few)
    compare_latents(small, small.network, few, student, seed=0)


def draw(backbone: Backbone, guidance_scale: float) -> torch.Tensor:
    """The latents of one image by our own sampling."""
    items, empty = backbone.encode([PROMPT])[0], backbone.encode([""])[0]
    return sample_teacher(
        backbone,
        backbone.collate(items),
        backbone.collate(empty),
        guidance_scale=guidance_scale,
        times=backbone.teacher_times(STEPS).to(backbone.network.device),
        noise=_draw_noise(backbone),
    )


def draw_by_pipeline(backbone: Backbone, guidance_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and the image by the teacher's own pipeline; of an SDXL with the sampler that DMDR gives it."""
    pipe = backbone.pipe
    own = pipe.scheduler
    if backbone.family == "sdxl":
        pipe.register_modules(scheduler=EulerDiscreteScheduler.from_config(own.config))
    try:
        latents = _call(pipe, backbone, guidance_scale, "latent")
        images = _call(pipe, backbone, guidance_scale, "pt")
    finally:
        pipe.register_modules(scheduler=own)
    return backbone.from_pipeline(latents), images


def _call(pipe: DiffusionPipeline, backbone: Backbone, guidance_scale: float, output: str) -> torch.Tensor:
    guidance: dict[str, object] = {"guidance_scale": guidance_scale + backbone.plain_guidance - 1.0}
    if backbone.family == "flux" and not backbone.guidance_is_input:  # its pipeline guides by another argument
        guidance = {"true_cfg_scale": guidance_scale, "negative_prompt": [""]}
    pipe.set_progress_bar_config(disable=True)
    return pipe(  # type: ignore[operator]  # each family's pipeline can be called; their base class cannot
        [PROMPT],
        num_inference_steps=STEPS,
        latents=backbone.to_pipeline(_draw_noise(backbone)),
        height=backbone.resolution,
        width=backbone.resolution,
        output_type=output,
        **guidance,
    ).images


def _draw_noise(backbone: Backbone) -> torch.Tensor:
    return noise_for(0, "teacher parity", shape=(1, *backbone.latent_shape)).to(backbone.network.device)


def _require_equal(whose: str, what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if not theirs.isfinite().all():
        raise DataError(f"{whose} draws {what} that are not numbers; give the teacher as it was published")
    difference = (ours.float() - theirs.float()).abs().max().item()
    if not difference <= TOLERANCE:
        raise DataError(
            f"{whose} draws other {what} than DMDR does with it: they differ by {difference:.2g}, allowed "
            f"{TOLERANCE:g}; something in the teacher's files is read in another way: give it as it was published"
        )
