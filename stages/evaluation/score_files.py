"""The files of an evaluation: the scorecard, scores by prompt and image, what metrics say, the images, the speed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pyarrow
from pyarrow import parquet

from dmdr.metrics.aggregate import Scores
from dmdr.metrics.scorecard import Model, Scorecard, Speed, Spread
from stages.evaluation.evaluation_set import Attempt, images_file, model_folder
from stages.evaluation.judging import Evaluators, ImageScores
from stages.evaluation.timing import DrawingTime, summarize
from stages.reports.score_lines import ScoreLine

SCHEMA = pyarrow.schema(
    [
        ("index", pyarrow.int64()),
        ("prompt", pyarrow.string()),
        ("model", pyarrow.string()),
        ("image", pyarrow.int32()),
        ("figure", pyarrow.string()),
        ("score", pyarrow.float64()),
    ]
)


def write_scorecard(attempt: Attempt, card: Scorecard) -> None:
    """scorecard.json."""
    text = json.dumps(card.to_json(), indent=2, allow_nan=False)
    (attempt.context.out / "scorecard.json").write_text(text + "\n", encoding="utf-8")


def write_scores(attempt: Attempt, scores: dict[str, Scores], evaluators: Evaluators) -> None:
    """scores.jsonl: a line for each prompt, with the mean over its images by model and figure; null is not a number."""
    evaluation_set = attempt.evaluation_set
    models = list(dict.fromkeys(model for figure in scores.values() for model in figure.by_model))
    lines = [
        ScoreLine(index, record["prompt"], {model: {} for model in models})
        for index, record in zip(evaluation_set.indices, evaluation_set.records, strict=True)
    ]
    for figure, of_figure in scores.items():
        judged = [
            line
            for line, record in zip(lines, evaluation_set.records, strict=True)
            if evaluators.judges(figure, record)
        ]
        for model, scores_P in of_figure.by_model.items():
            for line, score in zip(judged, scores_P.tolist(), strict=True):
                line.scores[model][figure] = score if math.isfinite(score) else None
    text = "".join(f"{json.dumps(asdict(line), ensure_ascii=False, allow_nan=False)}\n" for line in lines)
    (attempt.context.out / "scores.jsonl").write_text(text, encoding="utf-8")


def write_table(attempt: Attempt, image_scores: ImageScores, evaluators: Evaluators) -> None:
    """scores.parquet: one row for each image and figure.

    image is null where a figure is about all images of a prompt, and score where it is not a number.
    """
    evaluation_set = attempt.evaluation_set
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for figure, by_model in image_scores.figures.items():
        for model, scores_PS in by_model.items():
            for place, record in enumerate(evaluation_set.records):
                if not evaluators.judges(figure, record):
                    continue
                for number, score in enumerate(scores_PS[place].tolist()):
                    image = number if scores_PS.shape[1] == evaluation_set.seeds else None
                    row = (evaluation_set.indices[place], record["prompt"], model, image, figure, score)
                    for name, value in zip(columns, row, strict=True):
                        columns[name].append(value)
    table = pyarrow.table(columns, schema=SCHEMA)
    parquet.write_table(table, attempt.context.out / "scores.parquet", compression="zstd")


def write_lines(attempt: Attempt, image_scores: ImageScores) -> None:
    """What the metrics say image by image: <file>-<model>.jsonl."""
    for model, by_file in image_scores.lines.items():
        for name, lines in by_file.items():
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            (attempt.context.out / f"{name}-{model_folder(model)}.jsonl").write_text(text, encoding="utf-8")


def write_samples(attempt: Attempt, models: list[Model], device: str) -> Speed:
    """samples/ with all images, and speed.json, which stands apart from the scorecard because time is no result.

    device: on which the images were drawn. Returns the content of speed.json.
    """
    seconds: dict[str, float | None] = {}
    spread: dict[str, Spread] = {}
    for model in models:
        names = [images_file(model.name, number) for number in range(len(attempt.evaluation_set.shards()))]
        for name in names:
            attempt.shards.move(name, attempt.context.out / name)
        times = [DrawingTime.model_validate(attempt.shards.require(name).about) for name in names]
        seconds[model.name], of_model = summarize(times)
        if of_model is not None:
            spread[model.name] = of_model
    speed = Speed(device=device, batch_size=attempt.batch_size, seconds_per_image=seconds, spread=spread)
    text = json.dumps(speed.model_dump(), indent=1)
    (attempt.context.out / "speed.json").write_text(text + "\n", encoding="utf-8")
    return speed
