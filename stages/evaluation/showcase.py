"""What an evaluation shows: prompts of every task, the largest wins and losses, strips; grid.png and report.html."""

from __future__ import annotations

import math

from PIL import Image

from dmdr.config.identity import identity
from dmdr.config.stages import MODELS, TRAINING_STAGES, list_needed
from dmdr.metrics.aggregate import Scores
from dmdr.metrics.scorecard import Scorecard, Speed
from stages.evaluation.drawing import EvaluationSet, images_part, model_folder
from stages.evaluation.judging import Evaluators, Judged
from stages.evaluation.samples import Sample, image_file, unpack
from stages.reports import provenance
from stages.reports.charts import read_columns
from stages.reports.gallery import Row, Strip, build_grid, choose_prompts, encode_png, find_extremes, reduce_size
from stages.reports.page import render_page
from stages.reports.verdict import deciding_metric, describe_model
from stages.runtime.context import Context
from stages.store.shards import Shards

EXTREMES = 5  # prompts of either kind
STRIPS, LONGEST = 4, 8  # prompts, images of each

TRAINED = {  # training stage -> the models that went through it
    stage: {model for model in MODELS if stage in list_needed("evaluate", [model])} for stage in TRAINING_STAGES
}


def write_showcase(
    context: Context,
    exam: EvaluationSet,
    parts: Shards,
    jury: Evaluators,
    found: Judged,
    *,
    scores: dict[str, Scores],
    card: Scorecard,
    speed: Speed,
    base: str | None,
) -> None:
    """Write grid.png, report.html, and in images/ those of its first prompts, large ones reduced.

    base: the teacher as the paper calls it.
    """
    by_task = choose_prompts([record.get("tag") for record in exam.records])
    places = {"By task" if any(r.get("tag") for r in exam.records) else "Spread over the prompts": by_task}
    places |= find_largest(exam, jury, scores, card)
    wanted = {place for each in places.values() for place in each}
    samples = {model: read_images(exam, parts, model, wanted) for model in found.lines}
    rows = {
        heading: [build_row(exam, jury, found, samples, place) for place in each] for heading, each in places.items()
    }
    strips = [
        Strip(exam.records[place]["prompt"], {model: list(of[place].images[:LONGEST]) for model, of in samples.items()})
        for place in by_task[:STRIPS]
    ]
    keep_images(context, samples, by_task)
    headings = {each.name: f"{each.label}, {each.nfe} NFE" for each in card.models}
    (context.out / "grid.png").write_bytes(encode_png(build_grid(next(iter(rows.values())), headings)))
    (context.out / "report.html").write_text(
        build_report(context, card, speed, rows, strips if exam.seeds > 1 else [], base), encoding="utf-8"
    )


def find_largest(
    exam: EvaluationSet, jury: Evaluators, scores: dict[str, Scores], card: Scorecard
) -> dict[str, list[int]]:
    """Heading -> places where the first model leads the second most, and where it falls behind most."""
    if len(card.models) < 2:
        return {}
    figure, (first, second) = deciding_metric(card), [model.name for model in card.models[:2]]
    judged = [place for place, record in enumerate(exam.records) if jury.judges(figure, record)]
    by_model = scores[figure].by_model
    wins, losses = find_extremes(by_model[first], by_model[second], EXTREMES)
    return {
        f"Largest wins over {describe_model(second)}, by {figure}": [judged[place] for place in wins],
        f"Largest losses to {describe_model(second)}, by {figure}": [judged[place] for place in losses],
    }


def read_images(exam: EvaluationSet, parts: Shards, model: str, wanted: set[int]) -> dict[int, Sample]:
    """The samples of some places."""
    found = {}
    for number, shard in enumerate(exam.shards()):
        here = wanted.intersection(shard)
        if here:
            part = parts.require(images_part(model, number))
            found |= {each.place: each for each in unpack(part.file, here)}
    return found


def build_row(
    exam: EvaluationSet, jury: Evaluators, found: Judged, samples: dict[str, dict[int, Sample]], place: int
) -> Row:
    """A prompt's first images, each with what the metrics say of it."""
    record = exam.records[place]
    figures = [f for f in found.figures if any(f in m.figures and m.judges(record) for m in jury.metrics)]
    return Row(
        record["prompt"],
        record.get("tag"),
        {model: of[place].images[0] for model, of in samples.items()},
        {model: describe_scores({f: found.figures[f][model][place, 0] for f in figures}) for model in samples},
    )


def describe_scores(figures: dict[str, float]) -> str:
    return ", ".join(f"{f} {v:.2f}" if math.isfinite(v) else f"{f} broken" for f, v in figures.items())


def keep_images(context: Context, samples: dict[str, dict[int, Sample]], places: list[int]) -> None:
    """The images of these places as files, under the names that they have in the shards."""
    for model, of in samples.items():
        for place in places:
            for number, image in enumerate(of[place].images):
                path = context.out / "images" / model_folder(model) / image_file(place, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(reduce_size(Image.fromarray(image))))


def build_report(
    context: Context,
    card: Scorecard,
    speed: Speed,
    rows: dict[str, list[Row]],
    strips: list[Strip],
    base: str | None,
) -> str:
    """report.html."""
    sealed, compared = provenance.read_records(context), context.config.evaluate.models
    trained = [stage for stage, models in TRAINED.items() if stage in sealed and models.intersection(compared)]
    return render_page(
        card,
        speed,
        provenance.Origin(
            teacher=provenance.teacher_name(context.config.teacher.path),
            base=base,
            lines=provenance.build_table(context),
            settings=provenance.collect_settings(sealed, identity(context.config, "evaluate")),
        ),
        rows=rows,
        strips=strips,
        curves={stage: read_columns(context.input(stage) / "metrics.jsonl") for stage in trained},
    )
