"""The images of a model card: a few held-out prompts, drawn as `dmdr generate` draws them with seed 0."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dmdr.backbones.latent import silence_diffusers
from dmdr.backbones.protocol import Backbone
from dmdr.config.few_steps import FewSteps
from dmdr.metrics.scorecard import Model
from stages.generation.drawing import DrawingModel, build_call, draw_image
from stages.reports.gallery import TILE, build_tile

COUNT = 4
LARGEST = 512  # pixels of a side; hubs show a card's images at about that size
PROMPTS_FILE = "evaluation-00000.jsonl"  # of the stage prompts: the texts alone, a few kilobytes


def choose_prompts(folder: Path) -> list[str]:
    """At most COUNT evaluation prompts, evenly spread over those of PROMPTS_FILE."""
    lines = (folder / PROMPTS_FILE).read_text(encoding="utf-8").splitlines()
    count = min(COUNT, len(lines))
    prompts: list[str] = [json.loads(lines[place * len(lines) // count])["prompt"] for place in range(count)]
    return prompts


def draw_samples(backbone: Backbone, few: FewSteps, prompts: list[str]) -> list[Image.Image]:
    """An image of each prompt. The backbone's network is the student.

    Raises:
        NonFinite: an image is not a number.
    """
    pipe = backbone.build_student_pipeline(backbone.network, few)
    pipe.set_progress_bar_config(disable=True)
    student = DrawingModel(Model("student", few.steps, 1.0), pipe, build_call(backbone, few))
    with silence_diffusers():  # the stage prompts has told how many prompts are cut
        return [_fit(draw_image(student, prompt, seed=0).image) for prompt in prompts]


def _fit(image: Image.Image) -> Image.Image:
    """A picture at a size to look at."""
    if max(image.size) < TILE:
        return build_tile(np.asarray(image))
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image
