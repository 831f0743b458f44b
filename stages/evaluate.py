"""The stage evaluate: the scorecard of the models of `evaluate.models` on the same prompts and the same noise.

1. With `evaluate.limit`, the prompts are spread evenly over the evaluation prompts: a file sorted by task stays mixed.
2. All models draw first, shard by shard, then all metrics judge, so that networks and metrics are never in memory
   together. Finished shards of images and of scores are kept: a repeated command makes only what is missing, and its
   scorecard is the same.
3. Scores are those of 8-bit images, because anybody who has only the files scores these.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from pydantic import TypeAdapter

from dmdr import distributed
from dmdr.config.reward_weights import FIGURES, OF_REWARD, VERIFIERS
from dmdr.config.run import Config
from dmdr.config.stages import ModelName
from dmdr.errors import InputMissing, doing
from dmdr.metrics.aggregate import Conditions, build_scorecard
from dmdr.metrics.description import describe_metrics
from dmdr.metrics.dpg_bench import AnswersLine, DPGBench
from dmdr.metrics.load import check_metrics, load_metrics
from dmdr.metrics.protocol import Metric
from dmdr.metrics.reward import RewardMetric
from dmdr.metrics.scorecard import Model, TagMeans
from dmdr.promptset import PromptSet
from dmdr.rewards.identity import identify_reward
from dmdr.rewards.lab import LabReward
from dmdr.rewards.sources import list_sources
from stages.evaluation.drawing import draw_model
from stages.evaluation.evaluation_set import Attempt, EvaluationSet
from stages.evaluation.judging import Evaluators, ImageScores, gather_scores, judge_all
from stages.evaluation.models import build_sampler, list_models
from stages.evaluation.score_files import write_lines, write_samples, write_scorecard, write_scores, write_table
from stages.evaluation.showcase import Results, write_showcase
from stages.reports import provenance
from stages.reports.paper import base_model
from stages.reports.verdict import list_verdicts
from stages.runtime.context import Context
from stages.runtime.device import name_device, pick_device
from stages.runtime.prompt_inputs import PromptInputs
from stages.runtime.remaining import count_evaluations
from stages.store.shards import Shards

ANSWERS = TypeAdapter(list[AnswersLine])  # of the lines of a file, which have the image's name besides


def run(context: Context) -> dict[str, object]:
    """Draw and judge. Returns the facts for the record; only rank 0 has some.

    Writes scorecard.json, scores.jsonl, scores.parquet, speed.json, report.html, grid.png, samples/<model>-00000.tar
    with all images, images/ with those that are shown, results-<model>.jsonl as GenEval has it, and
    answers-<model>.jsonl of DPG-Bench, readings-<model>.jsonl of ocr.

    Raises:
        ConfigError: a metric is unknown or cannot judge these prompts.
        InputMissing: no metric has its weights; where only some lack them, the scorecard says so.
        DataError: an input is damaged.
        Stopped: SIGTERM arrived; the next attempt goes on.
    """
    attempt = begin_attempt(context)
    check_metrics(context.config.evaluate.metrics, attempt.evaluation_set.records)  # before hours of drawing
    models, base = draw_all(attempt)
    gc.collect()  # the networks go before the metrics come
    evaluators, missing = load_evaluators(attempt)
    judge_all(attempt, evaluators, models)
    distributed.barrier()  # until the other ranks have judged their shards
    if distributed.rank() > 0:
        return {}

    image_scores = gather_scores(attempt, models)
    scores = image_scores.average(attempt.evaluation_set, evaluators)
    categories = list_categories(evaluators.metrics, image_scores)
    card = build_scorecard(build_conditions(attempt, missing), models, scores, categories)
    write_scorecard(attempt, card)
    write_scores(attempt, scores, evaluators)
    write_table(attempt, image_scores, evaluators)
    write_lines(attempt, image_scores)
    speed = write_samples(attempt, models, name_device(context.config))
    write_showcase(attempt, evaluators, Results(image_scores, scores, card, speed), base=base)
    return {
        "prompts": card.prompts,
        "metrics": [row.model_dump() for row in card.metrics],
        "verdicts": [verdict.text for verdict in list_verdicts(card)],
    }


def begin_attempt(context: Context) -> Attempt:
    """Choose the prompts and count the work: each prompt of each model is drawn once and judged once.

    The work is counted in network evaluations, so that the time left is right for models of 4 and of 50."""
    config, inputs = context.config.evaluate, PromptInputs(context)
    prompts = inputs.open_split("evaluation")
    indices = prompts.spread(config.limit or len(prompts))
    evaluation_set = EvaluationSet(prompts, indices, prompts.records(indices), config.seeds)
    work = count_evaluations(context.config)
    total = sum(nfe + 1 for nfe in work.values()) * sum(map(len, evaluation_set.own_shards().values()))
    shards = Shards(context.artifact, context.cache.parent / "parts")
    return Attempt(context, inputs, evaluation_set, shards, work, tick=build_counter(context, total))


def build_counter(context: Context, total: int) -> Callable[[int], None]:
    """A function that adds to the work that is done and shows it beside `total`."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        context.progress.update(done, total)

    return tick


def draw_all(attempt: Attempt) -> tuple[list[Model], str | None]:
    """Draw the images of all models. Returns the models, and the teacher as the paper calls it."""
    context, config = attempt.context, attempt.context.config
    backbone = attempt.inputs.load_teacher(pick_device(config))
    encoded = attempt.inputs.open_encoded("evaluation", backbone)
    attempt = replace(attempt, evaluation_set=replace(attempt.evaluation_set, prompts=encoded))
    unconditional = backbone.collate([PromptSet.unconditional(attempt.inputs.files)])
    models = list_models(config, backbone)
    for model in models:
        load_sampler = partial(build_sampler, context, backbone, model, unconditional=unconditional)
        with doing(f"drawing the images of {model.name}"):
            draw_model(attempt, model, load_sampler, backbone=backbone)
    return models, base_model(type(backbone.network).__name__, backbone.network.config)


def load_evaluators(attempt: Attempt) -> tuple[Evaluators, dict[str, str]]:
    """Load the metrics that have their weights. Returns them, and the others by name, each with the reason.

    Raises:
        ConfigError: a metric is unknown or cannot judge these prompts.
        InputMissing: no metric has its weights.
    """
    config = attempt.context.config
    names, device = config.evaluate.metrics, pick_device(config)
    rewards = list_sources(config, say=attempt.context.progress.say, stop=attempt.context.stop)
    loaded = load_metrics(names, attempt.evaluation_set.records, device, rewards)
    for name, reason in loaded.missing.items():
        attempt.context.progress.say(f"{name} is left out: {reason}")
    embeddings = list_embeddings(loaded.metrics, list_trained_on(attempt.context))
    return Evaluators(loaded.metrics, loaded.lpips, embeddings, device), loaded.missing


def build_conditions(attempt: Attempt, missing: dict[str, str]) -> Conditions:
    """What the scorecard says besides the scores. missing: metric -> why it was not measured."""
    config, evaluation_set = attempt.context.config, attempt.evaluation_set
    descriptions = describe_metrics(config.evaluate.metrics, list_sources(config))
    facts = provenance.read_records(attempt.context)["prompts"].facts
    truncated = facts.get("truncated_evaluation", facts["truncated"])  # earlier prompts have one count of all
    assert isinstance(truncated, int)
    return Conditions(
        run=attempt.context.artifact.run,
        prompts=len(evaluation_set.records),
        seed=config.seed,
        images_per_prompt=evaluation_set.seeds,
        trained_on=list_trained_on(attempt.context),
        missing=missing,
        about={figure: description.to_facts() for figure, description in descriptions.items()},
        truncated=truncated,
    )


def list_categories(metrics: list[Metric], image_scores: ImageScores) -> dict[str, dict[str, TagMeans]]:
    """Figure -> model -> means by category, of DPG-Bench, which computes them from its answers."""
    categories: dict[str, dict[str, TagMeans]] = {}
    for metric in metrics:
        if isinstance(metric, DPGBench):
            for model, lines in image_scores.lines.items():
                answers = ANSWERS.validate_python(lines[metric.writes])
                for figure, means in metric.average_by_category(answers).items():
                    categories.setdefault(figure, {})[model] = means
    return categories


def list_trained_on(context: Context) -> set[str]:
    """The figures that a compared model was trained to raise: the student, and the cold start by RL of its own. A
    reward of DMDR that another process computed is known by its digest, whatever the config calls it."""
    config, names = context.config, list[str]()
    for stage, rl in config.list_rl().items():
        trained: set[ModelName] = {"student", "cold start"} if stage == "cold_start" else {"student"}
        if trained.isdisjoint(config.evaluate.models):
            continue
        record = provenance.read_records(context).get(stage)
        inputs = record.inputs if record is not None else {}
        keys = [f"reward:{name}" for name in rl.rewards if name in config.rewards]
        names += [*rl.rewards, *find_by_digest({inputs[key] for key in keys if key in inputs}, config)]
    return {figure for name in names for figure in FIGURES.get(name, (name,))}


def find_by_digest(digests: set[str], config: Config) -> list[str]:
    """The rewards of DMDR that have one of these digests, of those that the scorecard measures."""
    measured = [name for name in (*OF_REWARD, *VERIFIERS) if name.removesuffix("-soft") in config.evaluate.metrics]
    found = []
    for name in measured if digests else ():
        with suppress(InputMissing):  # then it is not on the scorecard
            if identify_reward(name, list_sources(config)).digest in digests:
                found.append(name)
    return found


def list_embeddings(metrics: list[Metric], trained_on: set[str]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The image encoders of the lab's rewards among the metrics, only of those that are held out."""
    rewards = [metric.reward for metric in metrics if isinstance(metric, RewardMetric)]
    held_out = [reward for reward in rewards if isinstance(reward, LabReward) and reward.name not in trained_on]
    return {reward.name: reward.embed_images for reward in held_out}
