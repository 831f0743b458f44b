"""Pictures of docs/: images that sealed evaluations hold, side by side.

    python -m docs.scripts.picture [--store runs] [--run quickstart]
    python -m docs.scripts.picture --gone-wrong [--store runs]

The first writes docs/pictures/quickstart.png: a row a model, a column a prompt. The second writes a strip for each run
of docs/pictures/gone-wrong.yaml. Prompts are taken evenly from the list; none is chosen by hand.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from dmdr.errors import USER_ERRORS
from stages.evaluation.evaluation_set import model_folder
from stages.evaluation.samples import Sample, unpack
from stages.reports.card import read_figures
from stages.reports.tables.spec import load_spec
from stages.store.artifacts import Artifact

FOLDER = Path(__file__).parents[1] / "pictures"
COLUMNS, TILE, GAP, MARGIN, HEADER = 8, 96, 6, 132, 40  # prompts; pixels: of a side, between, for words at left and top
INK, PAPER = (32, 48, 74), (255, 255, 255)
SHOWN = ("student", "teacher", "naive teacher")


def read_samples(store: str, run: str, model: str) -> list[Sample]:
    """All samples of a model, in the order of the prompts."""
    artifact = Artifact(store, run, "evaluate")
    beginning = f"samples/{model_folder(model)}-"
    names = sorted(name for name in artifact.sealed().files if name.startswith(beginning))
    with tempfile.TemporaryDirectory() as folder:
        fetched = artifact.fetch(Path(folder), names.__contains__)
        return [sample for name in names for sample in unpack(fetched / name)]


def spread(samples: list[Sample], count: int) -> list[Sample]:
    """`count` samples, evenly spaced, the first and the last among them."""
    return [samples[int(place)] for place in np.linspace(0, len(samples) - 1, count).round()]


def draw_strip(samples: list[Sample]) -> Image.Image:
    """The first image of each sample, side by side, tiny ones with their pixels sharp."""
    strip = Image.new("RGB", (len(samples) * (TILE + GAP) - GAP, TILE), PAPER)
    for column, sample in enumerate(samples):
        image = Image.fromarray(sample.images[0])
        way = Image.Resampling.NEAREST if image.width <= TILE else Image.Resampling.LANCZOS
        strip.paste(image.resize((TILE, TILE), way), (column * (TILE + GAP), 0))
    return strip


def draw_comparison(store: str, run: str) -> Image.Image:
    """A row for each model, a column for each prompt, with the prompts above and the models at the left."""
    artifact = Artifact(store, run, "evaluate")
    with tempfile.TemporaryDirectory() as folder:
        card = read_figures(artifact.fetch(Path(folder), "scorecard.json".__eq__), artifact.address)
    models = [model for model in card.models if model.name in SHOWN]
    rows = [spread(read_samples(store, run, model.name), COLUMNS) for model in models]
    strips = [draw_strip(row) for row in rows]
    width, height = MARGIN + strips[0].width, HEADER + len(strips) * (TILE + GAP) - GAP
    picture = Image.new("RGB", (width + 2 * GAP, height + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, sample in enumerate(rows[0]):
        words = textwrap.fill(sample.record["prompt"], 15)
        place = (GAP + MARGIN + column * (TILE + GAP) + TILE // 2, GAP + HEADER - 6)
        draw.multiline_text(place, words, INK, ImageFont.load_default(12), anchor="md", align="center", spacing=2)
    for number, (model, strip) in enumerate(zip(models, strips, strict=True)):
        top = GAP + HEADER + number * (TILE + GAP)
        picture.paste(strip, (GAP + MARGIN, top))
        draw.text((GAP, top + TILE // 2 - 2), model.name, INK, ImageFont.load_default(16), anchor="ls")
        draw.text((GAP, top + TILE // 2 + 4), f"{model.nfe} evaluations", INK, ImageFont.load_default(12), anchor="lt")
    return picture


def main(
    store: Annotated[str, typer.Option(help="where the runs lie")] = "runs",
    run: Annotated[str, typer.Option(help="the run of the picture")] = "quickstart",
    gone_wrong: Annotated[bool, typer.Option("--gone-wrong", help="the strips of gone-wrong.yaml instead")] = False,
) -> None:
    """Write the pictures of docs/ from sealed runs."""
    if not gone_wrong:
        draw_comparison(store, run).save(FOLDER / "quickstart.png", optimize=True)
        return
    spec = load_spec(FOLDER / "gone-wrong.yaml")
    for row in spec.rows:
        samples = read_samples(store, f"{spec.runs}-{row.name}-seed{spec.seeds[0]}", "student")
        draw_strip(spread(samples, COLUMNS)).save(FOLDER / f"{row.name}.png", optimize=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except USER_ERRORS as error:
        sys.exit(f"picture: {error}")
