"""Metrics judge the drawn images, shard by shard: each image is read once and shown to every metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from dmdr.config.prompt_record import PromptRecord
from dmdr.errors import Stopped, doing
from dmdr.metrics.aggregate import Scores
from dmdr.metrics.diversity import diversity
from dmdr.metrics.load import judge_images
from dmdr.metrics.lpips import FIGURE as LPIPS_FIGURE
from dmdr.metrics.lpips import LPIPS
from dmdr.metrics.protocol import Metric
from dmdr.metrics.scorecard import Model
from stages.evaluation.evaluation_set import Attempt, EvaluationSet, images_file, scores_file
from stages.evaluation.samples import Sample, image_file, unpack

JsonLine = dict[str, object]  # what a metric says about one image, as the benchmark's own script writes it


@dataclass(frozen=True)
class Evaluators:
    """All that judges images.

    lpips, and embeddings (held-out reward -> images to vectors): for diversity, from two images of a prompt on.
    """

    metrics: list[Metric]
    lpips: LPIPS | None
    embeddings: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    device: str

    def judges(self, figure: str, record: PromptRecord) -> bool:
        """Whether a figure applies to a prompt. Diversity applies to all."""
        metric = next((metric for metric in self.metrics if figure in metric.figures), None)
        return metric is None or metric.judges(record)


class ShardScores(BaseModel):
    """The scores of one shard of a model, as its file keeps them.

    figures: figure -> the scores of each prompt's images; None is not a number. lines: file -> lines.
    """

    model_config = ConfigDict(frozen=True)

    figures: dict[str, list[list[float | None]]]
    lines: dict[str, list[JsonLine]]


@dataclass(frozen=True)
class ImageScores:
    """The scores of all images.

    figures: figure -> model -> (prompts, images of each), NaN where a score is not a number. lines: model -> file ->
    what the metrics say image by image.
    """

    figures: dict[str, dict[str, np.ndarray]]
    lines: dict[str, dict[str, list[JsonLine]]]

    def average(self, evaluation_set: EvaluationSet, evaluators: Evaluators) -> dict[str, Scores]:
        """Each figure's scores (prompts,), means over a prompt's images, on the prompts that it judges."""
        scores: dict[str, Scores] = {}
        records = evaluation_set.records
        for figure, by_model in self.figures.items():
            places = [place for place, record in enumerate(records) if evaluators.judges(figure, record)]
            means = {model: scores_PS.mean(axis=1)[places] for model, scores_PS in by_model.items()}
            scores[figure] = Scores(means, [records[place].get("tag") for place in places])
        return scores


def judge_all(attempt: Attempt, evaluators: Evaluators, models: list[Model]) -> None:
    """Judge this rank's shards of all models, except those that an earlier attempt judged.

    Raises:
        Stopped: SIGTERM arrived. The shards that are judged are kept.
        DataError: an image does not read.
    """
    for model in models:
        for number, places in attempt.evaluation_set.own_shards().items():
            name = scores_file(model.name, number)
            if attempt.shards.get(name) is None:
                if attempt.context.stop():
                    raise Stopped(
                        "stopped; all images and the scores of finished shards are kept, repeat the command to go on"
                    )
                samples = list(unpack(attempt.shards.require(images_file(model.name, number)).file))
                batches = attempt.evaluation_set.split_batches(range(len(samples)), attempt.batch_size)
                scores = _judge_shard(evaluators, [[samples[n] for n in batch] for batch in batches])
                attempt.shards.keep(name, json.dumps(scores.model_dump(), allow_nan=False).encode())
            attempt.tick(len(places))


@torch.no_grad()
def _judge_shard(evaluators: Evaluators, batches: list[list[Sample]]) -> ShardScores:
    figures: dict[str, list[list[float | None]]] = {}
    lines: dict[str, list[JsonLine]] = {}
    for batch in batches:
        seeds = len(batch[0].images)
        images = torch.cat([sample.tensor() for sample in batch]).to(evaluators.device)
        records = [sample.record for sample in batch for _ in range(seeds)]
        files = [image_file(sample.place, number) for sample in batch for number in range(seeds)]
        for metric in evaluators.metrics:
            with doing(f"judging images with {', '.join(metric.figures)}"):
                scores_by_figure, results = judge_images(metric, images, records)
            for figure, scores in scores_by_figure.items():
                figures.setdefault(figure, []).extend(_list_rows(scores.reshape(-1, seeds)))
            named = [
                {"filename": f, **line.to_json()} for f, line in zip(files, results, strict=True) if line is not None
            ]
            if named and metric.writes is not None:
                lines.setdefault(metric.writes, []).extend(named)
        if seeds > 1:
            for figure, scores in _measure_diversity(evaluators, images.unflatten(0, (-1, seeds))).items():
                figures.setdefault(figure, []).extend(_list_rows(scores[:, None]))
    return ShardScores(figures=figures, lines=lines)


def _measure_diversity(evaluators: Evaluators, images_PSCHW: torch.Tensor) -> dict[str, np.ndarray]:
    """Figure -> (prompts,)."""
    distances = diversity(images_PSCHW, evaluators.embeddings)
    return {**distances, LPIPS_FIGURE: evaluators.lpips(images_PSCHW)} if evaluators.lpips else distances


def _list_rows(scores: np.ndarray) -> list[list[float | None]]:
    return [[value if np.isfinite(value) else None for value in row] for row in scores.tolist()]


def gather_scores(attempt: Attempt, models: list[Model]) -> ImageScores:
    """The scores from all ranks and all attempts, in the order of the prompts."""
    figures: dict[str, dict[str, list[list[float | None]]]] = {}
    lines: dict[str, dict[str, list[JsonLine]]] = {model.name: {} for model in models}
    for model in models:
        for number in range(len(attempt.evaluation_set.shards())):
            text = attempt.shards.require(scores_file(model.name, number)).file.read_text(encoding="utf-8")
            shard = ShardScores.model_validate(json.loads(text))
            for figure, rows in shard.figures.items():
                figures.setdefault(figure, {}).setdefault(model.name, []).extend(rows)
            for name, of_shard in shard.lines.items():
                lines[model.name].setdefault(name, []).extend(of_shard)
    arrays = {
        figure: {model: np.array(rows, dtype=np.float64) for model, rows in by_model.items()}
        for figure, by_model in figures.items()
    }
    return ImageScores(arrays, lines)
