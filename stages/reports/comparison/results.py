"""Reads evaluations from their sealed stages: scorecard, scores prompt by prompt, images, curves, records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dmdr.config.stages import STAGES
from dmdr.metrics.scorecard import ModelOnCard, Scorecard, Speed
from stages.reports.card import read_scorecard, read_speed
from stages.reports.charts import Point, read_columns
from stages.reports.score_lines import ScoreLine, read_score_lines
from stages.store.artifacts import Artifact
from stages.store.records import Record

CURVES = ("reward/", "watch/")  # columns of joint training that begin so become charts
COMPARED = ("student", "teacher")
FILES = ("scorecard.json", "speed.json", "scores.jsonl")
FIRST_IMAGE = "0000.png"


@dataclass(frozen=True)
class Prompt:
    """An evaluation prompt and its number in the prompt set."""

    index: int
    text: str


@dataclass(frozen=True)
class EvaluatedRun:
    """One run. prompts: in their order, in which a prompt's number is called its place.

    scores: model -> figure -> place -> score, NaN where it is not a number. images: model -> place -> (H, W, 3) uint8,
    of the prompts whose images the run kept. records: of its sealed stages.
    """

    run: str
    card: Scorecard
    speed: Speed
    prompts: list[Prompt]
    scores: dict[str, dict[str, dict[int, float]]]
    images: dict[str, dict[int, np.ndarray]]
    curves: dict[str, list[Point]]
    records: dict[str, Record]

    @property
    def student(self) -> ModelOnCard:
        """The model that stands for the run: its student, or its first model where it has none."""
        models = {model.name: model for model in self.card.models}
        return models.get("student", self.card.models[0])

    @property
    def settings(self) -> dict[str, object]:
        """Every setting that names the result, by its dotted name."""
        return {name: value for record in self.records.values() for name, value in record.identity.items()}


def read_runs(runs: list[str], store: str, cache: Path) -> list[EvaluatedRun]:
    """Read all runs, in their order. Checks that all are sealed before it fetches anything.

    Raises:
        InputMissing: an evaluation is not sealed.
        DataError: a file is damaged, or another version of DMDR wrote the scorecard.
    """
    for run in runs:
        Artifact(store, run, "evaluate").sealed()
    return [_read_run(run, store, cache / run) for run in runs]


def _read_run(run: str, store: str, cache: Path) -> EvaluatedRun:
    evaluation = Artifact(store, run, "evaluate")
    folder = evaluation.fetch(cache / "card", only=lambda name: name in FILES)
    card = read_scorecard(folder, evaluation.address)
    lines = read_score_lines(folder)
    records = _read_records(store, run)
    shown = {model.name for model in card.models}.intersection((*COMPARED, card.models[0].name))
    return EvaluatedRun(
        run,
        card,
        read_speed(folder, evaluation.address),
        prompts=[Prompt(line.index, line.prompt) for line in lines],
        scores={model.name: _collect_scores(lines, model.name) for model in card.models},
        images={model: _read_images(evaluation, cache / "images", model) for model in sorted(shown)},
        curves=_read_curves(store, run, cache / "joint") if "joint" in records else {},
        records=records,
    )


def _read_records(store: str, run: str) -> dict[str, Record]:
    """The records of the run's sealed stages, in data order."""
    records = {stage: Artifact(store, run, stage).record() for stage in STAGES}
    return {stage: record for stage, record in records.items() if record is not None}


def _collect_scores(lines: list[ScoreLine], model: str) -> dict[str, dict[int, float]]:
    """figure -> place -> score. A figure has no place for a prompt that it does not judge."""
    scores: dict[str, dict[int, float]] = {}
    for place, line in enumerate(lines):
        for figure, value in line.scores[model].items():
            scores.setdefault(figure, {})[place] = np.nan if value is None else value
    return scores


def _read_images(evaluation: Artifact, cache: Path, model: str) -> dict[int, np.ndarray]:
    """place -> the first image of the prompt, for the prompts whose images evaluate kept."""
    beginning = f"images/{model.replace(' ', '-')}/"
    names = [name for name in evaluation.sealed().files if name.startswith(beginning) and name.endswith(FIRST_IMAGE)]
    folder = evaluation.fetch(cache, only=names.__contains__)
    return {int(Path(name).parts[2]): np.asarray(Image.open(folder / name).convert("RGB")) for name in names}


def _read_curves(store: str, run: str, cache: Path) -> dict[str, list[Point]]:
    folder = Artifact(store, run, "joint").fetch(cache, only=lambda name: name == "metrics.jsonl")
    columns = read_columns(folder / "metrics.jsonl")
    return {name: points for name, points in columns.items() if name.startswith(CURVES)}
