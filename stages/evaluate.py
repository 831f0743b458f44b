"""The scorecard: the models of `evaluate.models` on the same prompts and the same noise.

With `evaluate.limit`, the prompts are spread evenly over the evaluation prompts: a file sorted by task stays mixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import torch

from dmdr import teacher
from dmdr.config import Config
from dmdr.identity import identity
from dmdr.metrics import Metric, load
from dmdr.metrics.reward import RewardMetric
from dmdr.metrics.scorecard import Scores, scorecard
from dmdr.promptset import PromptSet
from dmdr.rewards.lab import LabReward
from stages import Context, provenance
from stages.charts import read_columns
from stages.contestants import contestants, models
from stages.device import device
from stages.exam import Exam, judged, judged_by, sit
from stages.gallery import Row, chosen, grid, png
from stages.report import page
from stages.verdict import verdicts

# training stage -> the models that went through it
TRAINED = {"cold_start": {"student", "cold start"}, "joint": {"student"}}


def run(context: Context) -> dict:
    """Sample and judge; writes scorecard.json, scores.jsonl, report.html, grid.png, images/ and results-<model>.jsonl.

    Raises:
        ConfigError: a metric is unknown or cannot judge these prompts.
        DataError: an input is damaged.
        Stopped: SIGTERM arrived; the next run starts over.
    """
    config, folder = context.config, context.input("prompts")
    prompts = PromptSet(folder, "evaluation")
    indices = prompts.spread(config.evaluate.limit or len(prompts))
    records = prompts.records(indices)
    metrics = load(config.evaluate.metrics, records, device(config), config.weights)
    backbone = teacher.load(
        teacher.source(config.teacher), device(config), text=False, resolution=config.teacher.resolution
    )
    rows = {place: Row(records[place]["prompt"], records[place].get("tag")) for place in chosen(tags_of(records))}
    exam = Exam(backbone, prompts, indices, records, metrics, embeddings(metrics, trained_on(config)), rows)

    compared = models(config, backbone)
    found: dict[str, dict[str, np.ndarray]] = {}
    field = contestants(
        config, backbone, unconditional=backbone.collate([PromptSet.unconditional(folder)]), made=context.input
    )
    done = 0
    for contestant in field:
        for figure, values in sit(context, exam, contestant, done=done, total=len(compared) * len(records)).items():
            found.setdefault(figure, {})[contestant.model.name] = values
        done += len(records)
        del contestant  # or its network would wait beside the next one
    scores = judged(exam, {figure: {m: v.mean(axis=1) for m, v in by.items()} for figure, by in found.items()})
    card = scorecard(
        context.artifact.run, compared, scores=scores, prompts=len(records), seed=config.seed,
        images=config.evaluate.seeds, trained_on=trained_on(config),
    )  # fmt: skip
    annotate(exam, found)
    publish(context, card, list(rows.values()))
    write_scores(context, exam, scores)
    return {"prompts": len(records), "metrics": card["metrics"], "verdicts": [each["text"] for each in verdicts(card)]}


def trained_on(config: Config) -> set[str]:
    """The rewards that a compared model saw in training: only the student did."""
    return set(config.joint.rl.rewards if config.joint.rl and "student" in config.evaluate.models else ())


def embeddings(metrics: list[Metric], trained_on: set[str]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The image sides of the lab rewards among the metrics, held-out ones only."""
    rewards = [metric.reward for metric in metrics if isinstance(metric, RewardMetric)]
    held_out = [each for each in rewards if isinstance(each, LabReward) and each.name not in trained_on]
    return {each.name: each.embed_images for each in held_out}


def tags_of(records: list[dict]) -> list[str | None]:
    return [record.get("tag") for record in records]


def annotate(exam: Exam, found: dict[str, dict[str, np.ndarray]]) -> None:
    """Under each shown image, what the metrics say of it.

    found: figure -> model -> (prompts, images of each), of which the first is shown.
    """
    for place, row in exam.rows.items():
        figures = [f for metric in exam.metrics if metric.judges(exam.records[place]) for f in metric.figures]
        for model in row.images:
            values = {figure: found[figure][model][place, 0] for figure in figures}
            row.notes[model] = ", ".join(f"{f} {v:.2f}" if np.isfinite(v) else f"{f} broken" for f, v in values.items())


def write_scores(context: Context, exam: Exam, scores: dict[str, Scores]) -> None:
    """scores.jsonl: a prompt a line, with the mean over its images by model and figure; null is not a number."""
    lines: list[dict] = [
        {
            "index": index,
            "prompt": record["prompt"],
            "scores": {model.name: {} for model in models(context.config, exam.backbone)},
        }
        for index, record in zip(exam.indices, exam.records, strict=True)
    ]
    for figure, each in scores.items():
        places = judged_by(exam, figure)
        for model, values in each.by_model.items():
            for place, value in zip(places, values.tolist(), strict=True):
                lines[place]["scores"][model][figure] = value if math.isfinite(value) else None
    text = "".join(f"{json.dumps(line, ensure_ascii=False, allow_nan=False)}\n" for line in lines)
    (context.out / "scores.jsonl").write_text(text, encoding="utf-8")


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
