"""What an evaluation shows: prompts of every task, the largest wins and losses, strips; grid.png and report.html."""

from __future__ import annotations

import math

from PIL import Image

from dmdr.config.identity import identity
from dmdr.metrics.scorecard import Scores
from stages.evaluation.drawing import Exam, folder_of, images_part
from stages.evaluation.judging import Judged, Jury
from stages.evaluation.samples import Sample, file, unpacked
from stages.reports import provenance
from stages.reports.card import timed
from stages.reports.charts import read_columns
from stages.reports.gallery import Row, Strip, chosen, extremes, grid, png, reduced
from stages.reports.page import page
from stages.reports.verdict import called, deciding
from stages.runtime.context import Context
from stages.store.shards import Parts

EXTREMES = 5  # prompts of either kind
STRIPS, LONGEST = 4, 8  # prompts, images of each

# training stage -> the models that went through it
TRAINED = {"cold_start": {"student", "cold start"}, "joint": {"student"}}


def exhibit(
    context: Context, exam: Exam, parts: Parts, jury: Jury, found: Judged, *, scores: dict[str, Scores], card: dict,
    speed: dict, base: str | None,
) -> None:  # fmt: skip
    """Write grid.png, report.html, and in images/ those of its first prompts, large ones reduced.

    base: the teacher as the paper calls it.
    """
    by_task = chosen([record.get("tag") for record in exam.records])
    places = {"By task" if any(r.get("tag") for r in exam.records) else "Spread over the prompts": by_task}
    places |= largest(exam, jury, scores, card)
    wanted = {place for each in places.values() for place in each}
    samples = {model: drawn(exam, parts, model, wanted) for model in found.lines}
    rows = {heading: [row(exam, jury, found, samples, place) for place in each] for heading, each in places.items()}
    strips = [
        Strip(exam.records[place]["prompt"], {model: list(of[place].images[:LONGEST]) for model, of in samples.items()})
        for place in by_task[:STRIPS]
    ]
    keep(context, samples, by_task)
    headings = {each["name"]: f"{each['label']}, {each['nfe']} NFE" for each in card["models"]}
    (context.out / "grid.png").write_bytes(png(grid(next(iter(rows.values())), headings)))
    (context.out / "report.html").write_text(
        report(context, timed(card, speed), rows, strips if exam.seeds > 1 else [], base), encoding="utf-8"
    )


def largest(exam: Exam, jury: Jury, scores: dict[str, Scores], card: dict) -> dict[str, list[int]]:
    """Heading -> places where the first model leads the second most, and where it falls behind most."""
    if len(card["models"]) < 2:
        return {}
    figure, (first, second) = deciding(card), [model["name"] for model in card["models"][:2]]
    judged = [place for place, record in enumerate(exam.records) if jury.judges(figure, record)]
    by_model = scores[figure].by_model
    wins, losses = extremes(by_model[first], by_model[second], EXTREMES)
    return {
        f"Largest wins over {called(second)}, by {figure}": [judged[place] for place in wins],
        f"Largest losses to {called(second)}, by {figure}": [judged[place] for place in losses],
    }


def drawn(exam: Exam, parts: Parts, model: str, wanted: set[int]) -> dict[int, Sample]:
    """The samples of some places."""
    found = {}
    for number, shard in enumerate(exam.shards()):
        here = wanted.intersection(shard)
        if here:
            part = parts.get(images_part(model, number))
            assert part is not None, "drawn before it is shown"
            found |= {each.place: each for each in unpacked(part[0], here)}
    return found


def row(exam: Exam, jury: Jury, found: Judged, samples: dict[str, dict[int, Sample]], place: int) -> Row:
    """A prompt's first images, each with what the metrics say of it."""
    record = exam.records[place]
    figures = [f for f in found.figures if any(f in m.figures and m.judges(record) for m in jury.metrics)]
    return Row(
        record["prompt"], record.get("tag"), {model: of[place].images[0] for model, of in samples.items()},
        {model: noted({f: found.figures[f][model][place, 0] for f in figures}) for model in samples},
    )  # fmt: skip


def noted(figures: dict[str, float]) -> str:
    return ", ".join(f"{f} {v:.2f}" if math.isfinite(v) else f"{f} broken" for f, v in figures.items())


def keep(context: Context, samples: dict[str, dict[int, Sample]], places: list[int]) -> None:
    """The images of these places as files, under the names that they have in the shards."""
    for model, of in samples.items():
        for place in places:
            for number, image in enumerate(of[place].images):
                path = context.out / "images" / folder_of(model) / file(place, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(reduced(Image.fromarray(image))))


def report(context: Context, card: dict, rows: dict[str, list[Row]], strips: list[Strip], base: str | None) -> str:
    """report.html."""
    sealed, compared = provenance.records(context), context.config.evaluate.models
    trained = [stage for stage, models in TRAINED.items() if stage in sealed and models.intersection(compared)]
    return page(
        card,
        teacher=provenance.teacher_name(context.config.teacher.path),
        rows=rows,
        strips=strips,
        curves={stage: read_columns(context.input(stage) / "metrics.jsonl") for stage in trained},
        provenance=provenance.table(context),
        settings=provenance.settings(sealed, identity(context.config, "evaluate")),
        base=base,
    )
