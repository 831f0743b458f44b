"""The scorecard: the models of `evaluate.models` on the same prompts and the same noise.

1. With `evaluate.limit`, the prompts are spread evenly over the evaluation prompts: a file sorted by task stays mixed.
2. All models draw first, shard by shard, then all metrics judge, so that networks and metrics are never in memory
   together. Both are kept as they are finished: a repeated command makes what is missing, and ends with the same card.
3. Scores are those of 8-bit images, as anybody scores who has the files.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable

import pyarrow
import torch
from PIL import Image
from pyarrow import parquet

from dmdr import distributed, metrics, teacher
from dmdr.config import Config
from dmdr.identity import identity
from dmdr.metrics import Metric
from dmdr.metrics.reward import RewardMetric
from dmdr.metrics.scorecard import Model, Scores, scorecard
from dmdr.promptset import PromptSet
from dmdr.rewards.lab import LabReward
from stages import Context, provenance
from stages.charts import read_columns
from stages.contestants import models, sampler
from stages.device import device
from stages.drawing import Exam, Tick, draw, folder_of, images_part
from stages.gallery import Row, chosen, grid, png, reduced
from stages.judging import Judged, Jury, gathered, judge_all
from stages.parts import Parts
from stages.report import page
from stages.samples import file, unpacked
from stages.verdict import verdicts

# training stage -> the models that went through it
TRAINED = {"cold_start": {"student", "cold start"}, "joint": {"student"}}

SCHEMA = pyarrow.schema(
    [
        ("index", pyarrow.int64()), ("prompt", pyarrow.string()), ("model", pyarrow.string()),
        ("image", pyarrow.int32()), ("figure", pyarrow.string()), ("score", pyarrow.float64()),
    ]
)  # fmt: skip


def run(context: Context) -> dict:
    """Draw and judge; writes scorecard.json, scores.jsonl, scores.parquet, speed.json, report.html, grid.png,
    samples/<model>-00000.tar with all images, images/ with those that are shown, and results-<model>.jsonl.

    Raises:
        ConfigError: a metric is unknown or cannot judge these prompts.
        InputMissing: no metric has its weights; where only some lack them, the card says so.
        DataError: an input is damaged.
        Stopped: SIGTERM arrived; the next attempt goes on.
    """
    config, prompts = context.config, PromptSet(context.input("prompts"), "evaluation")
    indices = prompts.spread(config.evaluate.limit or len(prompts))
    exam = Exam(prompts, indices, prompts.records(indices), config.evaluate.seeds)
    metrics.check(config.evaluate.metrics, exam.records)  # before hours of drawing
    parts = Parts(context.artifact, context.cache.parent / "parts")
    field = len(config.evaluate.models) + len(config.evaluate.pipelines)
    tick = counter(context, 2 * field * sum(len(places) for _, places in exam.mine()))

    compared = draw_all(context, exam, parts, tick)
    gc.collect()  # the networks go before the metrics come
    judges, missing = metrics.load(config.evaluate.metrics, exam.records, device(config), config.weights)
    for name, why in missing.items():
        context.progress.say(f"{name} is left out: {why}")
    jury = Jury(judges, embeddings(judges, trained_on(config)), device(config))
    judge_all(context, exam, parts, jury, compared, tick)
    distributed.wait()  # for the parts of the others
    if distributed.rank():
        return {}

    found = gathered(exam, parts, compared)
    scores = found.scores(exam, jury)
    card = scorecard(
        context.artifact.run, compared, scores=scores, prompts=len(exam.records), seed=config.seed,
        images=exam.seeds, trained_on=trained_on(config),
    )  # fmt: skip
    card["missing"] = [{"metric": name, "why": why} for name, why in missing.items()]
    rows = shown(context, exam, parts, jury, found)
    publish(context, card, rows)
    write_scores(context, exam, scores, jury)
    write_table(context, exam, found, jury)
    write_samples(context, exam, parts, compared, found)
    return {"prompts": len(exam.records), "metrics": card["metrics"], "verdicts": [v["text"] for v in verdicts(card)]}


def counter(context: Context, total: int) -> Tick:
    """Shows how far the stage is; each prompt of each model counts when it is drawn and when it is judged."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        context.progress.update(done, total)

    return tick


def draw_all(context: Context, exam: Exam, parts: Parts, tick: Tick) -> list[Model]:
    """Every model's images; returns the models."""
    config = context.config
    backbone = teacher.load(
        teacher.source(config.teacher), device(config), text=False, resolution=config.teacher.resolution
    )
    unconditional = backbone.collate([PromptSet.unconditional(context.input("prompts"))])
    compared = models(config, backbone)
    for model in compared:
        draw(
            context, exam, parts, model, tick=tick, backbone=backbone,
            sampler=lambda model=model: sampler(
                config, backbone, model, unconditional=unconditional, made=context.input
            ),
        )  # fmt: skip
    return compared


def trained_on(config: Config) -> set[str]:
    """The rewards that a compared model saw in training: only the student did."""
    return set(config.joint.rl.rewards if config.joint.rl and "student" in config.evaluate.models else ())


def embeddings(metrics: list[Metric], trained_on: set[str]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The image sides of the lab rewards among the metrics, held-out ones only."""
    rewards = [metric.reward for metric in metrics if isinstance(metric, RewardMetric)]
    held_out = [each for each in rewards if isinstance(each, LabReward) and each.name not in trained_on]
    return {each.name: each.embed_images for each in held_out}


def shown(context: Context, exam: Exam, parts: Parts, jury: Jury, found: Judged) -> list[Row]:
    """The prompts on the page, with what the metrics say under each image; writes their images, large ones reduced."""
    places = chosen([record.get("tag") for record in exam.records])
    rows = {place: Row(exam.records[place]["prompt"], exam.records[place].get("tag")) for place in places}
    for model in found.lines:
        for number, shard in enumerate(exam.shards()):
            wanted = rows.keys() & set(shard)
            if not wanted:
                continue
            for each in unpacked(parts.get(images_part(model, number))[0], wanted):
                rows[each.place].images[model] = each.images[0]
                figures = [
                    f for f in found.figures if any(f in m.figures and m.judges(each.record) for m in jury.metrics)
                ]
                rows[each.place].notes[model] = noted({f: found.figures[f][model][each.place, 0] for f in figures})
                for n, image in enumerate(each.images):
                    path = context.out / "images" / folder_of(model) / file(each.place, n)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(png(reduced(Image.fromarray(image))))
    return list(rows.values())


def noted(figures: dict[str, float]) -> str:
    return ", ".join(f"{f} {v:.2f}" if math.isfinite(v) else f"{f} broken" for f, v in figures.items())


def write_scores(context: Context, exam: Exam, scores: dict[str, Scores], jury: Jury) -> None:
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


def write_table(context: Context, exam: Exam, found: Judged, jury: Jury) -> None:
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


def write_samples(context: Context, exam: Exam, parts: Parts, compared: list[Model], found: Judged) -> None:
    """samples/, GenEval's results-<model>.jsonl and speed.json, which is apart from the card: time is no result."""
    speed = {}
    for model in compared:
        names = [images_part(model.name, number) for number in range(len(exam.shards()))]
        for name in names:
            parts.move(name, context.out / name)
        about = [parts.get(name)[1] for name in names]
        speed[model.name] = sum(each["seconds"] for each in about) / sum(each["images"] for each in about)
        if found.lines[model.name]:
            text = "".join(f"{json.dumps(line)}\n" for line in found.lines[model.name])
            (context.out / f"results-{folder_of(model.name)}.jsonl").write_text(text, encoding="utf-8")
    said = {"seconds_per_image": speed, "batch_size": context.config.evaluate.batch_size}
    (context.out / "speed.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def publish(context: Context, card: dict, rows: list[Row]) -> None:
    """scorecard.json, grid.png and report.html."""
    (context.out / "scorecard.json").write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    headings = {each["name"]: f"{each['name']}, {each['nfe']} NFE" for each in card["models"]}
    (context.out / "grid.png").write_bytes(png(grid(rows, headings)))
    sealed, compared = provenance.records(context), context.config.evaluate.models
    trained = [stage for stage, models in TRAINED.items() if stage in sealed and models.intersection(compared)]
    curves = {stage: read_columns(context.input(stage) / "metrics.jsonl") for stage in trained}
    name = provenance.teacher_name(context.config.teacher.path)
    settings = provenance.settings(sealed, identity(context.config, "evaluate"))
    html = page(card, teacher=name, rows=rows, curves=curves, provenance=provenance.table(context), settings=settings)
    (context.out / "report.html").write_text(html, encoding="utf-8")
