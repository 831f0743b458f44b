"""What an evaluation found, as files: scores by prompt and by image, what metrics say of each, images and the speed."""

from __future__ import annotations

import json
import math

import pyarrow
from pyarrow import parquet

from dmdr.metrics.aggregate import Scores
from dmdr.metrics.scorecard import Model, Speed
from stages.evaluation.drawing import EvaluationSet, images_part, model_folder
from stages.evaluation.judging import Evaluators, Judged
from stages.runtime.context import Context
from stages.store.shards import Shards

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


def write_scores(context: Context, exam: EvaluationSet, scores: dict[str, Scores], jury: Evaluators) -> None:
    """scores.jsonl: a prompt a line, with the mean over its images by model and figure; null is not a number."""
    names = list(dict.fromkeys(model for each in scores.values() for model in each.by_model))
    lines: list[dict] = [
        {"index": index, "prompt": record["prompt"], "scores": {model: {} for model in names}}
        for index, record in zip(exam.indices, exam.records, strict=True)
    ]
    for figure, each in scores.items():
        places = [place for place, record in enumerate(exam.records) if jury.judges(figure, record)]
        for model, values in each.by_model.items():
            for place, value in zip(places, values.tolist(), strict=True):
                lines[place]["scores"][model][figure] = value if math.isfinite(value) else None
    text = "".join(f"{json.dumps(line, ensure_ascii=False, allow_nan=False)}\n" for line in lines)
    (context.out / "scores.jsonl").write_text(text, encoding="utf-8")


def write_table(context: Context, exam: EvaluationSet, found: Judged, jury: Evaluators) -> None:
    """scores.parquet: one row an image and figure; image is null where a figure is about all images of a prompt, score
    where it is not a number."""
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for figure, by_model in found.figures.items():
        for model, values in by_model.items():
            for place, record in enumerate(exam.records):
                if not jury.judges(figure, record):
                    continue
                for number, score in enumerate(values[place].tolist()):
                    image = number if values.shape[1] == exam.seeds else None
                    row = (exam.indices[place], record["prompt"], model, image, figure, score)
                    for name, value in zip(columns, row, strict=True):
                        columns[name].append(value)
    table = pyarrow.table(columns, schema=SCHEMA)
    parquet.write_table(table, context.out / "scores.parquet", compression="zstd")


def write_samples(
    context: Context, exam: EvaluationSet, parts: Shards, compared: list[Model], found: Judged, device: str
) -> Speed:
    """samples/, what the metrics say image by image, and speed.json, which is apart from the card: time is no result.

    Returns the speed.
    """
    seconds = {}
    for model in compared:
        names = [images_part(model.name, number) for number in range(len(exam.shards()))]
        for name in names:
            parts.move(name, context.out / name)
        about = [parts.require(name).about for name in names]
        seconds[model.name] = sum(each["seconds"] for each in about) / sum(each["images"] for each in about)
        for name, lines in found.lines[model.name].items():
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            (context.out / f"{name}-{model_folder(model.name)}.jsonl").write_text(text, encoding="utf-8")
    speed = Speed(device=device, batch_size=context.config.evaluate.batch_size, seconds_per_image=seconds)
    (context.out / "speed.json").write_text(json.dumps(speed.model_dump(), indent=1) + "\n", encoding="utf-8")
    return speed
