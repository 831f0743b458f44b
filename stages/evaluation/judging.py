"""Metrics judge the images that were drawn, shard by shard: each image is read once and shown to every metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dmdr.errors import Stopped
from dmdr.metrics.aggregate import Scores
from dmdr.metrics.diversity import diversity
from dmdr.metrics.load import judge_images
from dmdr.metrics.lpips import FIGURE as LPIPS_FIGURE
from dmdr.metrics.lpips import LPIPS
from dmdr.metrics.protocol import Metric
from dmdr.metrics.scorecard import Model
from dmdr.promptset import PromptRecord
from stages.evaluation.drawing import EvaluationSet, Tick, images_part, model_folder
from stages.evaluation.samples import Sample, image_file, unpack
from stages.runtime.context import Context
from stages.store.shards import Shards


@dataclass(frozen=True)
class Evaluators:
    """Who judges. lpips, and embeddings (held-out reward -> images to vectors), are for diversity: used from two images
    a prompt on."""

    metrics: list[Metric]
    lpips: LPIPS | None
    embeddings: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    device: str

    def judges(self, figure: str, record: PromptRecord) -> bool:
        """Whether a figure says something about a prompt; diversity is about all."""
        metric = next((metric for metric in self.metrics if figure in metric.figures), None)
        return metric is None or metric.judges(record)


def scores_part(model: str, shard: int) -> str:
    return f"scores/{model_folder(model)}-{shard:05d}.json"


def judge_all(
    context: Context, exam: EvaluationSet, parts: Shards, jury: Evaluators, models: list[Model], tick: Tick
) -> None:
    """Judge this rank's shards of all models, but for those that an earlier attempt judged.

    Raises:
        Stopped: asked to; the shards that were judged are kept.
        DataError: an image does not read.
    """
    for model in models:
        for number, places in exam.mine():
            name = scores_part(model.name, number)
            if parts.get(name) is None:
                if context.stop():
                    raise Stopped("stopped; all images and the scores of whole shards are kept, repeat to go on")
                drawn = parts.require(images_part(model.name, number))
                at_once = max(1, context.config.evaluate.batch_size // exam.seeds)
                found = _judge_shard(jury, list(unpack(drawn.file)), at_once)
                parts.keep(name, json.dumps(found, allow_nan=False).encode())
            tick(len(places))


@torch.no_grad()
def _judge_shard(jury: Evaluators, samples: list[Sample], at_once: int) -> dict:
    """{"figures": {figure: a list of S scores a prompt}, "lines": {file: lines}}; null is not a number."""
    figures: dict[str, list[list[float | None]]] = {}
    lines: dict[str, list[dict]] = {}
    for first in range(0, len(samples), at_once):
        batch = samples[first : first + at_once]
        seeds = len(batch[0].images)
        images = torch.cat([each.tensor() for each in batch]).to(jury.device)
        records = [each.record for each in batch for _ in range(seeds)]
        files = [image_file(each.place, number) for each in batch for number in range(seeds)]
        for metric in jury.metrics:
            found, results = judge_images(metric, images, records)
            for figure, scores in found.items():
                figures.setdefault(figure, []).extend(_to_plain(scores.reshape(-1, seeds)))
            told = [
                {"filename": f, **line.to_json()} for f, line in zip(files, results, strict=True) if line is not None
            ]
            if told:
                lines.setdefault(metric.writes, []).extend(told)
        if seeds > 1:
            images_PS = images.unflatten(0, (-1, seeds))
            distances = diversity(images_PS, jury.embeddings)
            distances |= {LPIPS_FIGURE: jury.lpips(images_PS)} if jury.lpips else {}
            for figure, scores in distances.items():
                figures.setdefault(figure, []).extend(_to_plain(scores[:, None]))
    return {"figures": figures, "lines": lines}


def _to_plain(scores: np.ndarray) -> list[list[float | None]]:
    return [[value if np.isfinite(value) else None for value in row] for row in scores.tolist()]


@dataclass(frozen=True)
class Judged:
    """figures: figure -> model -> (prompts, images of each), NaN where a score is none.

    lines: model -> file -> what the metrics say image by image.
    """

    figures: dict[str, dict[str, np.ndarray]]
    lines: dict[str, dict[str, list[dict]]]

    def scores(self, exam: EvaluationSet, jury: Evaluators) -> dict[str, Scores]:
        """Each figure's scores (prompts,), means over a prompt's images, on the prompts that it judges."""
        found = {}
        for figure, by_model in self.figures.items():
            places = [place for place, record in enumerate(exam.records) if jury.judges(figure, record)]
            tags = [exam.records[place].get("tag") for place in places]
            found[figure] = Scores({m: values.mean(axis=1)[places] for m, values in by_model.items()}, tags)
        return found


def gather_scores(exam: EvaluationSet, parts: Shards, models: list[Model]) -> Judged:
    """What all ranks and all attempts found, in the order of the prompts."""
    figures: dict[str, dict[str, list]] = {}
    lines: dict[str, dict[str, list[dict]]] = {model.name: {} for model in models}
    for model in models:
        for number in range(len(exam.shards())):
            part = parts.require(scores_part(model.name, number))
            found = json.loads(part.file.read_text(encoding="utf-8"))
            for figure, rows in found["figures"].items():
                figures.setdefault(figure, {}).setdefault(model.name, []).extend(rows)
            for name, told in found["lines"].items():
                lines[model.name].setdefault(name, []).extend(told)
    as_arrays = {
        figure: {model: np.array(rows, dtype=np.float64) for model, rows in by_model.items()}
        for figure, by_model in figures.items()
    }
    return Judged(as_arrays, lines)
