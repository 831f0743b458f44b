"""Any checkpoint that diffusers loads, on the same card: drawn by its own pipeline, with its own steps and guidance.

1. It starts from the run's own noise where its latents are the teacher's, in family and shape. A scheduler that adds
   noise later draws that itself, from a generator of each image's own seed. Any other pipeline draws all of it so.
2. Its images have the run's resolution.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dmdr.backbones.protocol import Backbone
from dmdr.config.run import Pipeline
from dmdr.errors import DataError
from dmdr.metrics.scorecard import Model
from dmdr.teacher.index import FAMILIES
from dmdr.teacher.load import backbone_classes, find_diffusers_folder
from stages.evaluation.batch import Batch, Sampler


def build_model(name: str, asked: Pipeline) -> Model:
    """Its column. At guidance up to what its family takes for none (1 of most), a step is one forward."""
    backbone = _find_backbone_class(_find_folder(name, asked))
    plain = backbone.plain_guidance if backbone else 1.0
    guided = asked.guidance_scale > plain
    return Model(
        name, asked.steps, asked.guidance_scale if guided else 1.0, bool(backbone and backbone.guidance_is_input)
    )


def build_sampler(name: str, asked: Pipeline, backbone: Backbone) -> Sampler:
    """Loads it on the teacher's device.

    Raises:
        DataError: diffusers does not load it, or it cannot draw so.
    """
    from diffusers import DiffusionPipeline

    folder, device = _find_folder(name, asked), backbone.network.device
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
    except Exception as error:  # each class has errors of its own
        raise DataError(f"evaluate.pipelines.{name}.path {asked.path} does not load: {_message(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    shared = type(pipe) is type(backbone.pipe) and pipe.vae_scale_factor == backbone.pipe.vae_scale_factor

    def draw(batch: Batch) -> torch.Tensor:
        given = {"latents": backbone.to_pipeline(batch.noises[0])} if shared else {}
        try:
            return pipe(
                batch.prompts,
                num_inference_steps=asked.steps,
                guidance_scale=asked.guidance_scale,
                height=backbone.resolution,
                width=backbone.resolution,
                output_type="pt",
                generator=batch.generators,
                **given,
            ).images
        except (TypeError, ValueError) as error:
            raise DataError(
                f"evaluate.pipelines.{name}: its {type(pipe).__name__} cannot draw at {asked.steps} steps, "
                f"{backbone.resolution} pixels: {_message(error)}"
            ) from error

    return draw


def _find_folder(name: str, asked: Pipeline) -> Path:
    return find_diffusers_folder(f"evaluate.pipelines.{name}.path", asked.path)


def _find_backbone_class(folder: Path) -> type[Backbone] | None:
    """The backbone of a family that DMDR knows."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    return backbone_classes()[FAMILIES[kind]] if kind in FAMILIES else None


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
