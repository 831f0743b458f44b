"""What an evaluation shows people: report.html, grid.png and images/.

They show prompts of every task, the largest wins and losses, and strips with several images of one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from dmdr.config.identity import identity
from dmdr.config.stages import MODELS, TRAINING_STAGES, list_needed
from dmdr.metrics.aggregate import Scores
from dmdr.metrics.scorecard import Scorecard, Speed
from stages.evaluation.evaluation_set import Attempt, images_file, model_folder
from stages.evaluation.judging import Evaluators, ImageScores
from stages.evaluation.samples import Sample, image_file, unpack
from stages.reports import provenance
from stages.reports.charts import read_columns
from stages.reports.gallery import Row, Strip, build_grid, choose_prompts, encode_png, find_extremes, reduce_size
from stages.reports.page import render_page
from stages.reports.verdict import deciding_metric, describe_model
from stages.runtime.context import Context
from stages.store.published_teachers import teacher_name

EXTREMES = 5  # prompts with the largest wins, and as many with the largest losses
STRIPS, LONGEST = 4, 8  # prompts, images of each

TRAINED = {  # training stage -> the models that went through it
    stage: {model for model in MODELS if stage in list_needed("evaluate", [model])} for stage in TRAINING_STAGES
}

Samples = dict[str, dict[int, Sample]]  # model -> place -> the prompt's images


@dataclass(frozen=True)
class Results:
    """All that was measured. scores: by figure, the means over a prompt's images that the scorecard is made of."""

    image_scores: ImageScores
    scores: dict[str, Scores]
    card: Scorecard
    speed: Speed


def write_showcase(attempt: Attempt, evaluators: Evaluators, results: Results, *, base: str | None) -> None:
    """Write grid.png, report.html, and in images/ those of its first prompts, large ones reduced.

    base: the teacher as the paper calls it.
    """
    records, out = attempt.evaluation_set.records, attempt.context.out
    by_task = choose_prompts([record.get("tag") for record in records])
    heading = "By task" if any(record.get("tag") for record in records) else "Spread over the prompts"
    sections = {heading: by_task, **find_largest(attempt, evaluators, results)}
    shown = {place for places in sections.values() for place in places}
    samples = {model.name: read_images(attempt, model.name, shown) for model in results.card.models}
    rows = {
        heading: [build_row(attempt, evaluators, results, samples, place) for place in places]
        for heading, places in sections.items()
    }
    strips = [build_strip(samples, place) for place in by_task[:STRIPS]] if attempt.evaluation_set.seeds > 1 else []
    write_images(attempt.context, samples, by_task)
    titles = {model.name: f"{model.label}, {model.nfe} NFE" for model in results.card.models}
    (out / "grid.png").write_bytes(encode_png(build_grid(next(iter(rows.values())), titles)))
    page = render_report(attempt.context, results, rows, strips, base)
    (out / "report.html").write_text(page, encoding="utf-8")


def find_largest(attempt: Attempt, evaluators: Evaluators, results: Results) -> dict[str, list[int]]:
    """Heading -> places where the first model leads the second most, and places where it falls behind most."""
    if len(results.card.models) < 2:
        return {}
    figure, (first, second) = deciding_metric(results.card), [model.name for model in results.card.models[:2]]
    records = attempt.evaluation_set.records
    judged = [place for place, record in enumerate(records) if evaluators.judges(figure, record)]
    by_model = results.scores[figure].by_model
    wins, losses = find_extremes(by_model[first], by_model[second], EXTREMES)
    return {
        f"Largest wins over {describe_model(second)}, by {figure}": [judged[number] for number in wins],
        f"Largest losses to {describe_model(second)}, by {figure}": [judged[number] for number in losses],
    }


def read_images(attempt: Attempt, model: str, places: set[int]) -> dict[int, Sample]:
    """A model's samples at some places."""
    samples: dict[int, Sample] = {}
    for number, shard in enumerate(attempt.evaluation_set.shards()):
        in_shard = places.intersection(shard)
        if in_shard:
            file = attempt.shards.require(images_file(model, number)).file
            samples |= {sample.place: sample for sample in unpack(file, in_shard)}
    return samples


def build_row(attempt: Attempt, evaluators: Evaluators, results: Results, samples: Samples, place: int) -> Row:
    """The first images of a prompt, one of each model, with what the metrics say of them."""
    record, figures = attempt.evaluation_set.records[place], results.image_scores.figures
    judged = [
        figure
        for figure in figures
        if any(figure in metric.figures and metric.judges(record) for metric in evaluators.metrics)
    ]
    return Row(
        record["prompt"],
        record.get("tag"),
        {model: by_place[place].images[0] for model, by_place in samples.items()},
        {model: describe_scores({figure: figures[figure][model][place, 0] for figure in judged}) for model in samples},
    )


def build_strip(samples: Samples, place: int) -> Strip:
    """Several images of one prompt by each model."""
    images = {model: list(by_place[place].images[:LONGEST]) for model, by_place in samples.items()}
    (prompt,) = {by_place[place].record["prompt"] for by_place in samples.values()}
    return Strip(prompt, images)


def describe_scores(scores: dict[str, float]) -> str:
    """The scores of one image in a line; by figure."""
    return ", ".join(
        f"{figure} {score:.2f}" if math.isfinite(score) else f"{figure} broken" for figure, score in scores.items()
    )


def write_images(context: Context, samples: Samples, places: list[int]) -> None:
    """The images at these places as files, under the names that they have in the shards."""
    for model, by_place in samples.items():
        for place in places:
            for number, image in enumerate(by_place[place].images):
                path = context.out / "images" / model_folder(model) / image_file(place, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(reduce_size(Image.fromarray(image))))


def render_report(
    context: Context, results: Results, rows: dict[str, list[Row]], strips: list[Strip], base: str | None
) -> str:
    """report.html."""
    sealed, compared = provenance.read_records(context), context.config.evaluate.models
    trained = [stage for stage, models in TRAINED.items() if stage in sealed and models.intersection(compared)]
    return render_page(
        results.card,
        results.speed,
        provenance.Origin(
            teacher=teacher_name(context.config.teacher.path),
            base=base,
            lines=provenance.build_table(context),
            settings=provenance.collect_settings(sealed, identity(context.config, "evaluate")),
        ),
        rows=rows,
        strips=strips,
        curves={stage: read_columns(context.input(stage) / "metrics.jsonl") for stage in trained},
    )
