"""What the runs of a table found, read from their seals: scores prompt by prompt, images, curves, records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dmdr.errors import ConfigError
from stages.reports.card import read_figures
from stages.reports.charts import Point, read_columns
from stages.reports.tables.plan import Run
from stages.reports.tables.spec import Curves
from stages.store.artifacts import Artifact
from stages.store.records import Record

IMAGES = 4  # of one prompt and row that are shown


@dataclass(frozen=True)
class Found:
    """One finished run. scores: figure -> (prompts,), NaN where a score is not a number.

    images: prompt -> its first images (H, W, 3) uint8. records: the seals of its stages.
    """

    run: Run
    scores: dict[str, np.ndarray]
    trained_on: set[str]
    images: dict[str, list[np.ndarray]]
    curves: dict[str, list[Point]]
    records: dict[str, Record]


def read_results(runs: list[Run], store: str, curves: Curves | None, cache: Path) -> list[Found]:
    """The runs whose evaluation is sealed, in their order.

    Raises:
        DataError: a file is damaged.
        ConfigError: two runs were judged on different prompts.
    """
    found, asked = [], None
    for run in runs:
        records = {stage: Artifact(store, run.name, stage).record() for stage in run.row.stages}
        if records["evaluate"] is None:
            continue
        model = run.row.model
        shown = f"images/{model.replace(' ', '-')}/"
        sealed = Artifact(store, run.name, "evaluate")
        folder = sealed.fetch(cache / run.name, only=partial(_is_wanted, shown=shown))
        card = read_figures(folder, sealed.address)
        lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts = [line["prompt"] for line in lines]
        if (asked := asked or prompts) != prompts:
            raise ConfigError(
                f"{run.name} was judged on other prompts than {runs[0].name}; give all rows the same prompts and "
                "evaluate.limit"
            )
        found.append(
            Found(
                run,
                scores=_read_scores(lines, model),
                trained_on={each.name for each in card.metrics if each.trained_on},
                images=_read_images(folder / shown, prompts),
                curves=_read_curves(run, store, curves, cache),
                records={stage: record for stage, record in records.items() if record is not None},
            )
        )
    return found


def _is_wanted(name: str, shown: str) -> bool:
    return name in ("scorecard.json", "scores.jsonl") or name.startswith(shown)


def _read_scores(lines: list[dict], model: str) -> dict[str, np.ndarray]:
    """A prompt that a metric does not judge has no score of it; null is not a number."""
    figures = dict.fromkeys(figure for line in lines for figure in line["scores"][model])
    of_model = [line["scores"][model] for line in lines]
    return {f: np.array([each[f] for each in of_model if f in each], dtype=np.float64) for f in figures}


def _read_images(folder: Path, prompts: list[str]) -> dict[str, list[np.ndarray]]:
    found = {}
    for place in sorted(folder.iterdir()):
        files = sorted((place / "samples").iterdir())[:IMAGES]
        found[prompts[int(place.name)]] = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return found


def _read_curves(run: Run, store: str, curves: Curves | None, cache: Path) -> dict[str, list[Point]]:
    if curves is None or curves.stage not in run.row.stages:
        return {}
    folder = Artifact(store, run.name, curves.stage).fetch(
        cache / f"{run.name}-{curves.stage}", only=lambda name: name == "metrics.jsonl"
    )
    columns = read_columns(folder / "metrics.jsonl")
    return {name: columns[name] for name in curves.columns if name in columns}
