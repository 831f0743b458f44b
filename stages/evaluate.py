"""The scorecard: student, teacher, naive teacher and cold start on the same prompts and the same noise.

1. Noise is a function of (seed, prompt, step), so that students of 1, 2 and 4 steps and one seed start alike.
2. With `evaluate.limit`, the prompts are spread evenly over the evaluation prompts: a file sorted by task stays mixed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch

from dmdr import teacher
from dmdr.backbones import Backbone
from dmdr.config import identity
from dmdr.metrics import Metric, judge, load
from dmdr.metrics.scorecard import Scores, scorecard
from dmdr.promptset import PromptSet
from dmdr.rollout import noise_for
from stages import Context, Stopped, provenance
from stages.artifacts import Artifact
from stages.charts import read_columns
from stages.contestants import Contestant, contestants, models
from stages.device import device
from stages.gallery import Row, chosen, grid, png
from stages.report import page
from stages.verdict import verdicts


@dataclass(frozen=True)
class Exam:
    """What every contestant sits. indices: of prompts in the PromptSet; rows: what is shown, by place in records."""

    backbone: Backbone
    prompts: PromptSet
    indices: list[int]
    records: list[dict]
    metrics: list[Metric]
    rows: dict[int, Row]


def run(context: Context) -> dict:
    """Sample and judge; writes scorecard.json, report.html, grid.png and results-<model>.jsonl.

    Raises:
        ConfigError: a metric is unknown or cannot judge these prompts.
        DataError: an input is damaged.
        Stopped: SIGTERM arrived; the next run starts over.
    """
    config, folder = context.config, context.input("prompts")
    prompts = PromptSet(folder, "evaluation")
    indices = spread(len(prompts), config.evaluate.limit)
    records = prompts.records(indices)
    metrics = load(config.evaluate.metrics, records, device(config))
    backbone = teacher.load(teacher.resolve(config.teacher.path), device(config), text=False)
    rows = {place: Row(records[place]["prompt"], records[place].get("tag")) for place in chosen(tags_of(records))}
    exam = Exam(backbone, prompts, indices, records, metrics, rows)

    has_cold_start = Artifact(context.artifact.store, context.artifact.run, "cold_start").record() is not None
    compared = models(config, has_cold_start)
    found: dict[str, dict[str, np.ndarray]] = {figure: {} for metric in metrics for figure in metric.figures}
    field = contestants(
        config, backbone, unconditional=backbone.collate([PromptSet.unconditional(folder)]),
        exported=context.input("export") / "pipeline",
        cold_start=context.input("cold_start") if has_cold_start else None,
    )  # fmt: skip
    for number, contestant in enumerate(field):
        done, total = number * len(records), len(compared) * len(records)
        for figure, values in sit(context, exam, contestant, done=done, total=total).items():
            found[figure][contestant.model.name] = values
    card = scorecard(
        context.artifact.run, compared, scores=judged(metrics, records, found), prompts=len(records), seed=config.seed,
        trained_on=set(config.joint.rl.rewards if config.joint.rl else ()),
    )  # fmt: skip
    annotate(exam, found)
    publish(context, card, list(rows.values()), has_cold_start)
    return {"prompts": len(records), "metrics": card["metrics"], "verdicts": [each["text"] for each in verdicts(card)]}


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` indices below `count`, evenly spaced and ascending."""
    wanted = min(count, limit or count)
    return [place * count // wanted for place in range(wanted)]


def tags_of(records: list[dict]) -> list[str | None]:
    return [record.get("tag") for record in records]


@torch.no_grad()
def sit(context: Context, exam: Exam, contestant: Contestant, *, done: int, total: int) -> dict[str, np.ndarray]:
    """Scores (prompts,) of one contestant by figure; writes its results-<model>.jsonl and its column of the rows.

    done, total: images of all contestants, for the progress line.
    """
    config, name = context.config, contestant.model.name
    batches: dict[str, list[np.ndarray]] = {figure: [] for metric in exam.metrics for figure in metric.figures}
    lines: list[dict] = []
    for first in range(0, len(exam.indices), config.evaluate.batch_size):
        if context.stop():
            raise Stopped("stopped; nothing was kept, repeat the command to begin anew")
        batch = slice(first, first + config.evaluate.batch_size)
        indices, records = exam.indices[batch], exam.records[batch]
        noises = noises_for(config.seed, indices, steps=config.student.steps, shape=exam.backbone.latent_shape)
        c = exam.backbone.collate(exam.prompts.items(indices))
        latents = contestant.sample(c, noises.to(exam.backbone.network.device))
        images = exam.backbone.decode(latents).float()
        for metric in exam.metrics:
            figures, results = judge(metric, images, records)
            for figure, scores in figures.items():
                batches[figure].append(scores)
            for place, line in enumerate(results):
                if line is not None:
                    lines.append({"filename": f"{first + place:05d}/samples/0000.png", **line})
        for place in exam.rows.keys() & set(range(first, first + len(indices))):
            exam.rows[place].images[name] = pixels(images[place - first])
        context.progress.update(done + first + len(indices), total)
    if lines:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (context.out / f"results-{name.replace(' ', '-')}.jsonl").write_text(text, encoding="utf-8")
    return {figure: np.concatenate(parts) for figure, parts in batches.items()}


def noises_for(seed: int, indices: list[int], *, steps: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """(steps, B, C, H, W): each prompt's own noise, the start first."""
    per_step = [[noise_for(seed, "evaluate", index, step, shape=shape) for index in indices] for step in range(steps)]
    return torch.stack([torch.stack(noises) for noises in per_step])


def pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8; what is not a number is black."""
    return (image.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def judged(metrics: list[Metric], records: list[dict], found: dict[str, dict[str, np.ndarray]]) -> dict[str, Scores]:
    """Each figure's scores, on the prompts that its metric judges."""
    scores = {}
    for metric in metrics:
        places = [place for place, record in enumerate(records) if metric.judges(record)]
        for figure in metric.figures:
            by_model = {model: values[places] for model, values in found[figure].items()}
            scores[figure] = Scores(by_model, [records[place].get("tag") for place in places])
    return scores


def annotate(exam: Exam, found: dict[str, dict[str, np.ndarray]]) -> None:
    """Under each shown image, what the metrics say of it."""
    for place, row in exam.rows.items():
        figures = [f for metric in exam.metrics if metric.judges(exam.records[place]) for f in metric.figures]
        for model in row.images:
            values = {figure: found[figure][model][place] for figure in figures}
            row.notes[model] = ", ".join(f"{f} {v:.2f}" if np.isfinite(v) else f"{f} broken" for f, v in values.items())


def publish(context: Context, card: dict, rows: list[Row], has_cold_start: bool) -> None:
    """scorecard.json, grid.png and report.html."""
    (context.out / "scorecard.json").write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    headings = {each["name"]: f"{each['name']}, {each['nfe']} NFE" for each in card["models"]}
    (context.out / "grid.png").write_bytes(png(grid(rows, headings)))
    trained = [*(["cold_start"] if has_cold_start else []), "joint"]
    curves = {stage: read_columns(context.input(stage) / "metrics.jsonl") for stage in trained}
    name = provenance.teacher_name(context.config.teacher.path)
    settings = provenance.settings(provenance.records(context), identity(context.config, "evaluate"))
    html = page(card, teacher=name, rows=rows, curves=curves, provenance=provenance.table(context), settings=settings)
    (context.out / "report.html").write_text(html, encoding="utf-8")
