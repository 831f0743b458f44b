"""Any checkpoint that diffusers loads can stand on the scorecard; it draws by its own pipeline, steps and guidance.

1. A pipeline whose latents have the teacher's family and shape starts from the run's own noise. Its scheduler may add
   noise later; it draws that itself, from a generator of each image's own seed. Any other pipeline draws all of its
   noise from that generator.
2. Its images have the run's resolution.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.config.evaluation import Pipeline
from dmdr.errors import DataError
from dmdr.metrics.scorecard import Model
from dmdr.teacher.index import FAMILIES
from dmdr.teacher.load import backbone_classes, find_diffusers_folder
from stages.evaluation.batch import Batch, Sampler


def build_model(name: str, pipeline: Pipeline) -> Model:
    """The pipeline's column on the scorecard.

    Up to the guidance scale that its family takes for no guidance (1 for most), a step is one forward.
    """
    backbone = _find_backbone_class(_find_folder(name, pipeline))
    plain_guidance = backbone.plain_guidance if backbone else 1.0
    guidance = pipeline.guidance_scale if pipeline.guidance_scale > plain_guidance else 1.0
    return Model(name, pipeline.steps, guidance, backbone is not None and backbone.guidance_is_input)


def build_sampler(name: str, pipeline: Pipeline, backbone: Backbone) -> Sampler:
    """Load the pipeline on the teacher's device. Returns the function that draws with it.

    Raises:
        DataError: diffusers does not load it. The function: it cannot draw with these steps at this resolution.
    """
    from diffusers import DiffusionPipeline

    folder, device = _find_folder(name, pipeline), backbone.network.device
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
    except Exception as error:  # each pipeline class raises errors of its own
        raise DataError(f"evaluate.pipelines.{name}.path {pipeline.path} does not load: {_message(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    shares_latents = type(pipe) is type(backbone.pipe) and pipe.vae_scale_factor == backbone.pipe.vae_scale_factor

    def draw(batch: Batch) -> torch.Tensor:
        start = {"latents": backbone.to_pipeline(batch.noises[0])} if shares_latents else {}
        try:
            return pipe(  # type: ignore[operator]  # each pipeline class can be called; their base class cannot
                batch.prompts,
                num_inference_steps=pipeline.steps,
                guidance_scale=pipeline.guidance_scale,
                height=backbone.resolution,
                width=backbone.resolution,
                output_type="pt",
                generator=batch.generators,
                **start,
            ).images
        except (TypeError, ValueError) as error:
            raise DataError(
                f"evaluate.pipelines.{name}: its {type(pipe).__name__} cannot draw at {pipeline.steps} steps, "
                f"{backbone.resolution} pixels: {_message(error)}"
            ) from error

    return draw


def _find_folder(name: str, pipeline: Pipeline) -> Path:
    return find_diffusers_folder(f"evaluate.pipelines.{name}.path", pipeline.path)


def _find_backbone_class(folder: Path) -> type[Backbone] | None:
    """The backbone of a family that DMDR knows."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    return backbone_classes()[FAMILIES[kind]] if kind in FAMILIES else None


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
