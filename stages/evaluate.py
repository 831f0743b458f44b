"""The scorecard: the models of `evaluate.models` on the same prompts and the same noise.

1. With `evaluate.limit`, the prompts are spread evenly over the evaluation prompts: a file sorted by task stays mixed.
2. All models draw first, shard by shard, then all metrics judge, so that networks and metrics are never in memory
   together. Both are kept as they are finished: a repeated command makes what is missing, and ends with the same card.
3. Scores are those of 8-bit images, as anybody scores who has the files.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable

import torch

from dmdr import distributed
from dmdr.config.run import Config
from dmdr.metrics.aggregate import Conditions, build_scorecard
from dmdr.metrics.description import describe_metrics
from dmdr.metrics.dpg_bench import AnswersLine, DPGBench
from dmdr.metrics.load import check_metrics, load_metrics
from dmdr.metrics.protocol import Metric
from dmdr.metrics.reward import RewardMetric
from dmdr.metrics.scorecard import Model, TagMeans
from dmdr.promptset import PromptSet
from dmdr.rewards.lab import LabReward
from dmdr.teacher.load import find_teacher_of, load_teacher
from stages.evaluation.drawing import EvaluationSet, Tick, draw_model
from stages.evaluation.judging import Evaluators, Judged, gather_scores, judge_all
from stages.evaluation.models import build_sampler, list_models
from stages.evaluation.score_files import write_samples, write_scores, write_table
from stages.evaluation.showcase import write_showcase
from stages.reports import provenance
from stages.reports.paper import base_model
from stages.reports.verdict import list_verdicts
from stages.runtime.context import Context
from stages.runtime.device import name_device, pick_device
from stages.store.shards import Shards


def run(context: Context) -> dict:
    """Draw and judge; writes scorecard.json, scores.jsonl, scores.parquet, speed.json, report.html, grid.png,
    samples/<model>-00000.tar with all images, images/ with those that are shown, results-<model>.jsonl as GenEval has
    it, and answers-<model>.jsonl of DPG-Bench.

    Raises:
        ConfigError: a metric is unknown or cannot judge these prompts.
        InputMissing: no metric has its weights; where only some lack them, the card says so.
        DataError: an input is damaged.
        Stopped: SIGTERM arrived; the next attempt goes on.
    """
    config, prompts = context.config, PromptSet(context.input("prompts"), "evaluation")
    indices = prompts.spread(config.evaluate.limit or len(prompts))
    exam = EvaluationSet(prompts, indices, prompts.records(indices), config.evaluate.seeds)
    check_metrics(config.evaluate.metrics, exam.records)  # before hours of drawing
    parts = Shards(context.artifact, context.cache.parent / "parts")
    field = len(config.evaluate.models) + len(config.evaluate.pipelines)
    tick = build_counter(context, 2 * field * sum(len(places) for _, places in exam.mine()))

    compared, base = draw_all(context, exam, parts, tick)
    gc.collect()  # the networks go before the metrics come
    loaded = load_metrics(config.evaluate.metrics, exam.records, pick_device(config), config.weights)
    for name, why in loaded.missing.items():
        context.progress.say(f"{name} is left out: {why}")
    embeddings = image_embeddings(loaded.metrics, rewards_trained_on(config))
    jury = Evaluators(loaded.metrics, loaded.lpips, embeddings, pick_device(config))
    judge_all(context, exam, parts, jury, compared, tick)
    distributed.barrier()  # for the parts of the others
    if distributed.rank():
        return {}

    found = gather_scores(exam, parts, compared)
    scores = found.scores(exam, jury)
    facts = provenance.read_records(context)["prompts"].facts
    truncated = facts.get("truncated_evaluation", facts["truncated"])  # earlier prompts have one count of all
    assert isinstance(truncated, int)
    conditions = Conditions(
        run=context.artifact.run,
        prompts=len(exam.records),
        seed=config.seed,
        images_per_prompt=exam.seeds,
        trained_on=rewards_trained_on(config),
        missing=loaded.missing,
        about={
            figure: description.to_facts()
            for figure, description in describe_metrics(config.evaluate.metrics, config.weights).items()
        },
        truncated=truncated,
    )
    card = build_scorecard(conditions, compared, scores, list_categories(loaded.metrics, found))
    text = json.dumps(card.to_json(), indent=2, allow_nan=False)
    (context.out / "scorecard.json").write_text(text + "\n", encoding="utf-8")
    write_scores(context, exam, scores, jury)
    write_table(context, exam, found, jury)
    speed = write_samples(context, exam, parts, compared, found, name_device(config))
    write_showcase(context, exam, parts, jury, found, scores=scores, card=card, speed=speed, base=base)
    return {
        "prompts": len(exam.records),
        "metrics": [row.model_dump() for row in card.metrics],
        "verdicts": [verdict.text for verdict in list_verdicts(card)],
    }


def list_categories(metrics: list[Metric], judged: Judged) -> dict[str, dict[str, TagMeans]]:
    """Figure -> model -> means by category, of DPG-Bench, which computes them from its answers."""
    categories: dict[str, dict[str, TagMeans]] = {}
    for metric in metrics:
        if isinstance(metric, DPGBench):
            for model, lines in judged.lines.items():
                answers = [AnswersLine(each["item_id"], each["answers"]) for each in lines[metric.writes]]
                for figure, means in metric.average_by_category(answers).items():
                    categories.setdefault(figure, {})[model] = means
    return categories


def build_counter(context: Context, total: int) -> Tick:
    """Shows how far the stage is; each prompt of each model counts when it is drawn and when it is judged."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        context.progress.update(done, total)

    return tick


def draw_all(context: Context, exam: EvaluationSet, parts: Shards, tick: Tick) -> tuple[list[Model], str | None]:
    """Every model's images; returns the models, and the teacher as the paper calls it."""
    config = context.config
    backbone = load_teacher(
        find_teacher_of(config.teacher), pick_device(config), text=False, resolution=config.teacher.resolution
    )
    unconditional = backbone.collate([PromptSet.unconditional(context.input("prompts"))])
    compared = list_models(config, backbone)
    for model in compared:
        draw_model(
            context,
            exam,
            parts,
            model,
            tick=tick,
            backbone=backbone,
            sampler=lambda model=model: build_sampler(
                config, backbone, model, unconditional=unconditional, made=context.input
            ),
        )
    return compared, base_model(type(backbone.network).__name__, backbone.network.config)


def rewards_trained_on(config: Config) -> set[str]:
    """The rewards that a compared model saw in training: only the student did."""
    return set(config.joint.rl.rewards if config.joint.rl and "student" in config.evaluate.models else ())


def image_embeddings(metrics: list[Metric], trained_on: set[str]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The image sides of the lab rewards among the metrics, held-out ones only."""
    rewards = [metric.reward for metric in metrics if isinstance(metric, RewardMetric)]
    held_out = [each for each in rewards if isinstance(each, LabReward) and each.name not in trained_on]
    return {each.name: each.embed_images for each in held_out}
