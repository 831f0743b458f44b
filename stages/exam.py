"""What every contestant of an evaluation sits: the same prompts and the same noise, judged by the same metrics.

1. Noise is a function of (seed, prompt, step), so that students of 1, 2 and 4 steps and one seed start alike.
2. With `evaluate.seeds` a prompt has several images, each from its own noise, and a figure of the prompt is their mean.
   The first image is the one that a single seed draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dmdr.backbones import Backbone
from dmdr.metrics import Metric, judge
from dmdr.metrics.diversity import diversity
from dmdr.metrics.scorecard import Scores
from dmdr.promptset import PromptSet
from dmdr.rollout import noise_for
from stages import Context, Stopped
from stages.contestants import Contestant
from stages.gallery import Row, png, reduced


@dataclass(frozen=True)
class Exam:
    """What every contestant sits. indices: of prompts in the PromptSet; rows: what is shown, by place in records.

    embeddings: held-out lab reward -> images to vectors, for diversity; used from two seeds on.
    """

    backbone: Backbone
    prompts: PromptSet
    indices: list[int]
    records: list[dict]
    metrics: list[Metric]
    embeddings: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    rows: dict[int, Row]


@torch.no_grad()
def sit(context: Context, exam: Exam, contestant: Contestant, *, done: int, total: int) -> dict[str, np.ndarray]:
    """Scores (prompts, seeds) of one contestant by figure, diversity (prompts, 1); writes its
    results-<model>.jsonl, its images of the shown prompts and its column of the rows.

    done, total: prompts of all contestants, for the progress line.
    """
    config, name, seeds = context.config, contestant.model.name, context.config.evaluate.seeds
    batches: dict[str, list[np.ndarray]] = {}
    lines: list[dict] = []
    at_once = max(1, config.evaluate.batch_size // seeds)  # prompts: a batch holds all images of each
    for first in range(0, len(exam.indices), at_once):
        if context.stop():
            raise Stopped("stopped; nothing was kept, repeat the command to begin anew")
        batch = slice(first, first + at_once)
        indices, records = exam.indices[batch], [each for each in exam.records[batch] for _ in range(seeds)]
        shape = exam.backbone.latent_shape
        noises = noises_for(config.seed, indices, steps=config.student.steps, shape=shape, seeds=seeds)
        c = exam.backbone.collate([item for item in exam.prompts.items(indices) for _ in range(seeds)])
        latents = contestant.sample(c, noises.to(exam.backbone.network.device))
        images = exam.backbone.decode(latents).float()
        files = [image_file(first + number // seeds, number % seeds) for number in range(len(images))]
        for metric in exam.metrics:
            figures, results = judge(metric, images, records)
            for figure, scores in figures.items():
                batches.setdefault(figure, []).append(scores.reshape(-1, seeds))
            lines += [{"filename": file, **line} for file, line in zip(files, results, strict=True) if line is not None]
        if seeds > 1:
            for figure, scores in diversity(images.unflatten(0, (-1, seeds)), exam.embeddings).items():
                batches.setdefault(figure, []).append(scores[:, None])
        for place in exam.rows.keys() & set(range(first, first + len(indices))):
            mine = slice((place - first) * seeds, (place - first + 1) * seeds)
            exam.rows[place].images[name] = pixels(images[mine][0])
            show(context.out / "images" / folder_of(name), files[mine], images[mine])
        context.progress.update(done + first + len(indices), total)
    if lines:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (context.out / f"results-{folder_of(name)}.jsonl").write_text(text, encoding="utf-8")
    return {figure: np.concatenate(parts) for figure, parts in batches.items()}


def noises_for(
    seed: int, indices: list[int], *, steps: int, shape: tuple[int, int, int], seeds: int = 1
) -> torch.Tensor:
    """(steps, B seeds, C, H, W): each image's own noise, the start first; a prompt's images stand together."""
    draws = [(index, number) for index in indices for number in range(seeds)]

    def noise(index: int, step: int, number: int) -> torch.Tensor:
        own = (number,) if number else ()  # the first image is the one of a single seed
        return noise_for(seed, "evaluate", index, step, *own, shape=shape)

    return torch.stack([torch.stack([noise(index, step, number) for index, number in draws]) for step in range(steps)])


def folder_of(model: str) -> str:
    return model.replace(" ", "-")


def image_file(place: int, number: int) -> str:
    """Where GenEval looks for image `number` of a prompt."""
    return f"{place:05d}/samples/{number:04d}.png"


def show(folder: Path, files: list[str], images: torch.Tensor) -> None:
    """Write images (S, 3, H, W) in [0, 1] under their names, large ones reduced."""
    for file, image in zip(files, images, strict=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(png(reduced(Image.fromarray(pixels(image)))))


def pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8; what is not a number is black."""
    return (image.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def judged_by(exam: Exam, figure: str) -> list[int]:
    """Places of the prompts that a figure says something about; diversity is about all."""
    metric = next((metric for metric in exam.metrics if figure in metric.figures), None)
    return [place for place, record in enumerate(exam.records) if metric is None or metric.judges(record)]


def judged(exam: Exam, found: dict[str, dict[str, np.ndarray]]) -> dict[str, Scores]:
    """Each figure's scores (prompts,), on the prompts that it judges."""
    scores = {}
    for figure, by_model in found.items():
        places = judged_by(exam, figure)
        tags = [exam.records[place].get("tag") for place in places]
        scores[figure] = Scores({model: values[places] for model, values in by_model.items()}, tags)
    return scores
