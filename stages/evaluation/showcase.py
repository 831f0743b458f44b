"""What an evaluation shows people: report.html, grid.png and images/.

They show prompts of every task, the largest wins and losses, strips with several images of one prompt, and all prompts
in small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dmdr.config.identity import identity
from dmdr.config.stages import MODELS, TRAINING_STAGES, list_needed
from dmdr.metrics.aggregate import Scores
from dmdr.metrics.scorecard import Scorecard, Speed
from stages.evaluation.evaluation_set import Attempt, model_folder
from stages.evaluation.judging import Evaluators, ImageScores
from stages.evaluation.samples import image_file
from stages.evaluation.survey import Samples, Survey, survey_images
from stages.reports import provenance
from stages.reports.charts import Point, read_columns
from stages.reports.explorer import Prompt
from stages.reports.film import FRAMES, ROWS, Film, build_film
from stages.reports.gallery import Row, Strip, build_grid, choose_prompts, encode_png, find_extremes, reduce_size
from stages.reports.page import Shown, render_page
from stages.reports.pictures import Captioned, split_notes
from stages.reports.running import read_series
from stages.reports.stage_times import list_stage_times
from stages.reports.verdict import deciding_metric, describe_model
from stages.runtime.context import Context
from stages.store.published_teachers import teacher_name
from stages.store.records import Record

FEATURED = 4  # prompts that lead the page
EXTREMES = 5  # prompts with the largest wins, and as many with the largest losses
STRIPS, LONGEST = 4, 8  # prompts, images of each

TRAINED = {  # training stage -> the models that went through it
    stage: {model for model in MODELS if stage in list_needed("evaluate", [model])} for stage in TRAINING_STAGES
}


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
    sections = find_largest(attempt, evaluators, results)
    survey = survey_images(attempt, results.card.models, {*by_task, *(n for of in sections.values() for n in of)})
    notes = ImageNotes(attempt, evaluators, results)
    first = [build_row(notes, survey.samples, place) for place in by_task]
    strips = by_task[:STRIPS] if attempt.evaluation_set.seeds > 1 else []
    shown = Shown(
        featured=first[:: math.ceil(len(first) / FEATURED)],
        sections={
            heading: [build_row(notes, survey.samples, place) for place in places]
            for heading, places in sections.items()
        },
        strips=[build_strip(survey.samples, place) for place in strips],
        prompts=[build_prompt(notes, survey, place) for place in range(len(records))],
        broken=survey.broken,
    )
    write_images(attempt.context, survey.samples, by_task)
    titles = {model.name: f"{model.label}, {model.nfe} NFE" for model in results.card.models}
    (out / "grid.png").write_bytes(encode_png(build_grid(first, titles)))
    (out / "report.html").write_text(render_report(attempt.context, results, shown, base), encoding="utf-8")


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


class ImageNotes:
    """What the metrics say of each image."""

    def __init__(self, attempt: Attempt, evaluators: Evaluators, results: Results) -> None:
        self.records, self.figures = attempt.evaluation_set.records, results.image_scores.figures
        self.labels = {model.name: model.label for model in results.card.models}
        self.judges = evaluators.judges
        self.reasons = read_reasons(results.image_scores)

    def list_scores(self, place: int) -> dict[str, dict[str, np.ndarray]]:
        """Figure -> model -> the scores of a prompt's images, of the figures that judge it."""
        judged = [figure for figure in self.figures if self.judges(figure, self.records[place])]
        return {figure: {model: scores[place] for model, scores in self.figures[figure].items()} for figure in judged}

    def describe(self, place: int) -> dict[str, str]:
        """Model -> the scores of its first image."""
        scores = self.list_scores(place)
        return {
            model: describe_scores({figure: float(by_model[model][0]) for figure, by_model in scores.items()})
            for model in self.labels
        }

    def explain(self, place: int) -> dict[str, str]:
        """Model -> why its first image is wrong."""
        file = image_file(place, 0)
        return {model: reasons[file] for model, reasons in self.reasons.items() if file in reasons}


def read_reasons(image_scores: ImageScores) -> dict[str, dict[str, str]]:
    """Model -> image file -> why a checker found the image wrong, from the lines of checkers that tell it."""
    return {
        model: {
            str(line["filename"]): str(line["reason"])
            for lines in by_file.values()
            for line in lines
            if line.get("reason")
        }
        for model, by_file in image_scores.lines.items()
    }


def build_row(notes: ImageNotes, samples: Samples, place: int) -> Row:
    """The first images of a prompt, one of each model, with what the metrics say of them."""
    record = notes.records[place]
    images = {model: by_place[place].images[0] for model, by_place in samples.items()}
    return Row(record["prompt"], record.get("tag"), images, notes.describe(place), notes.explain(place))


def build_prompt(notes: ImageNotes, survey: Survey, place: int) -> Prompt:
    """A prompt of the list of all prompts, with small images where they fit."""
    record, described, reasons = notes.records[place], notes.describe(place), notes.explain(place)
    scores = {
        figure: {model: float(scores_S.mean()) for model, scores_S in by_model.items()}
        for figure, by_model in notes.list_scores(place).items()
    }
    images = tuple(
        Captioned(by_place[place], notes.labels[model], split_notes(described[model]), reasons.get(model, ""))
        for model, by_place in survey.pictures.items()
        if place in by_place
    )
    return Prompt(record["prompt"], record.get("tag"), scores, images, place in survey.faulty)


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


def render_report(context: Context, results: Results, shown: Shown, base: str | None) -> str:
    """report.html."""
    sealed, compared = provenance.read_records(context), context.config.evaluate.models
    trained = [stage for stage, models in TRAINED.items() if stage in sealed and models.intersection(compared)]
    curves: dict[str, dict[str, list[Point]]] = {
        stage: read_columns(context.input(stage) / "metrics.jsonl") for stage in trained
    }
    return render_page(
        results.card,
        results.speed,
        provenance.Origin(
            teacher=teacher_name(context.config.teacher.path),
            base=base,
            lines=provenance.build_table(context),
            settings=provenance.collect_settings(sealed, identity(context.config, "evaluate")),
            times=list_stage_times(sealed),
        ),
        shown=shown,
        curves=curves,
        films=build_films(context, {stage: sealed[stage] for stage in trained}),
    )


def build_films(context: Context, trained: Mapping[str, Record]) -> list[Film]:
    """The film strips of training stages, as far as what they showed is still there. trained: stage -> its record."""
    films = []
    for stage, record in trained.items():
        run = record.provenance.adopted_from or context.artifact.run
        if (found := read_series(context.artifact.store, run, stage)) is not None:
            films.append(build_film(*found, frames=FRAMES, rows=ROWS))
    return [film for film in films if film is not None]
