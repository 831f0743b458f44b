"""The results of a table's runs, read from their sealed stages: scores prompt by prompt, images, curves, records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dmdr.errors import ConfigError
from stages.reports.card import read_figures
from stages.reports.charts import Point, read_columns
from stages.reports.score_lines import ScoreLine, read_score_lines
from stages.reports.tables.plan import Run
from stages.reports.tables.spec import Curves
from stages.store.artifacts import Artifact
from stages.store.records import Record

IMAGES = 4  # shown of one prompt and row


@dataclass(frozen=True)
class FinishedRun:
    """One finished run. scores: figure -> (prompts,), NaN where a score is not a number.

    images: prompt -> its first images (H, W, 3) uint8. records: of its sealed stages.
    """

    run: Run
    scores: dict[str, np.ndarray]
    trained_on: set[str]
    images: dict[str, list[np.ndarray]]
    curves: dict[str, list[Point]]
    records: dict[str, Record]


def read_results(runs: list[Run], store: str, curves: Curves | None, cache: Path) -> list[FinishedRun]:
    """Read the runs whose evaluation is sealed, in their order.

    Raises:
        DataError: a file is damaged.
        ConfigError: two runs were judged on different prompts.
    """
    finished: list[FinishedRun] = []
    common_prompts: list[str] | None = None
    for run in runs:
        records = _read_records(run, store)
        if "evaluate" not in records:
            continue
        evaluation = Artifact(store, run.name, "evaluate")
        image_folder = f"images/{run.row.model.replace(' ', '-')}/"
        folder = _fetch_files(evaluation, ("scorecard.json", "scores.jsonl", image_folder), cache / run.name)
        lines = read_score_lines(folder)
        prompts = [line.prompt for line in lines]
        if common_prompts is None:
            common_prompts = prompts
        elif prompts != common_prompts:
            raise ConfigError(
                f"{run.name} was judged on other prompts than {finished[0].run.name}; give all rows the same prompts "
                "and evaluate.limit"
            )
        finished.append(
            FinishedRun(
                run,
                scores=_collect_scores(lines, run.row.model),
                trained_on={row.name for row in read_figures(folder, evaluation.address).metrics if row.trained_on},
                images=_read_images(folder / image_folder, prompts),
                curves=_read_curves(run, store, curves, cache),
                records=records,
            )
        )
    return finished


def _read_records(run: Run, store: str) -> dict[str, Record]:
    """The records of the run's sealed stages."""
    records = {stage: Artifact(store, run.name, stage).record() for stage in run.stages}
    return {stage: record for stage, record in records.items() if record is not None}


def _fetch_files(evaluation: Artifact, beginnings: tuple[str, ...], cache: Path) -> Path:
    """A folder with the files whose names begin so."""
    return evaluation.fetch(cache, only=lambda name: name.startswith(beginnings))


def _collect_scores(lines: list[ScoreLine], model: str) -> dict[str, np.ndarray]:
    """figure -> the scores of the prompts that it judges; null is not a number."""
    of_model = [line.scores[model] for line in lines]
    figures = dict.fromkeys(figure for scores in of_model for figure in scores)
    return {
        figure: np.array([scores[figure] for scores in of_model if figure in scores], dtype=np.float64)
        for figure in figures
    }


def _read_images(folder: Path, prompts: list[str]) -> dict[str, list[np.ndarray]]:
    images = {}
    for place in sorted(folder.iterdir()):
        files = sorted((place / "samples").iterdir())[:IMAGES]
        images[prompts[int(place.name)]] = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return images


def _read_curves(run: Run, store: str, curves: Curves | None, cache: Path) -> dict[str, list[Point]]:
    if curves is None or curves.stage not in run.stages:
        return {}
    folder = Artifact(store, run.name, curves.stage).fetch(
        cache / f"{run.name}-{curves.stage}", only=lambda name: name == "metrics.jsonl"
    )
    columns = read_columns(folder / "metrics.jsonl")
    return {name: columns[name] for name in curves.columns if name in columns}
