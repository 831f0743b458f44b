"""What an evaluation found, read from its seal: the scorecard, scores prompt by prompt, images, curves, records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dmdr.config.stages import STAGES
from dmdr.metrics.scorecard import ModelOnCard, Scorecard, Speed
from stages.reports.card import read_scorecard, read_speed
from stages.reports.charts import Point, read_columns
from stages.store.artifacts import Artifact
from stages.store.records import Record

CURVES = ("reward/", "watch/")  # how the columns of joint training begin that are drawn over each other
COMPARED = ("student", "teacher")
FIRST_IMAGE = "0000.png"


@dataclass(frozen=True)
class Evaluated:
    """One run. prompts: (index, text) in order; scores: model -> figure -> place -> score, NaN where it is no number.

    images: model -> place -> (H, W, 3) uint8, of the prompts that the run kept. records: of its sealed stages.
    """

    run: str
    card: Scorecard
    speed: Speed
    prompts: list[tuple[int, str]]
    scores: dict[str, dict[str, dict[int, float]]]
    images: dict[str, dict[int, np.ndarray]]
    curves: dict[str, list[Point]]
    records: dict[str, Record]

    @property
    def student(self) -> ModelOnCard:
        """The model that stands for the run: its student, or the first where it has none."""
        models = {model.name: model for model in self.card.models}
        return models.get("student", self.card.models[0])

    @property
    def settings(self) -> dict[str, object]:
        """Every setting that names the result."""
        return {name: value for record in self.records.values() for name, value in record.identity.items()}


def read_runs(runs: list[str], store: str, cache: Path) -> list[Evaluated]:
    """All runs in their order; every seal is looked at before anything is fetched.

    Raises:
        InputMissing: an evaluate is not sealed.
        DataError: a file is damaged, or a scorecard is of another DMDR.
    """
    for run in runs:
        Artifact(store, run, "evaluate").sealed()
    return [_read_run(run, store, cache / run) for run in runs]


def _read_run(run: str, store: str, cache: Path) -> Evaluated:
    sealed = Artifact(store, run, "evaluate")
    folder = sealed.fetch(cache / "card", only=lambda name: name in ("scorecard.json", "speed.json", "scores.jsonl"))
    card = read_scorecard(folder, sealed.address)
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {stage: Artifact(store, run, stage).record() for stage in STAGES}
    records = {stage: record for stage, record in found.items() if record is not None}
    shown = {model.name for model in card.models}.intersection((*COMPARED, card.models[0].name))
    return Evaluated(
        run,
        card,
        read_speed(folder, sealed.address),
        prompts=[(line["index"], line["prompt"]) for line in lines],
        scores={model.name: _read_scores(lines, model.name) for model in card.models},
        images={model: _read_images(sealed, cache / "images", model) for model in sorted(shown)},
        curves=_read_curves(store, run, cache / "joint") if "joint" in records else {},
        records=records,
    )


def _read_scores(lines: list[dict], model: str) -> dict[str, dict[int, float]]:
    """A prompt that a metric does not judge has no score of it; null is not a number."""
    found: dict[str, dict[int, float]] = {}
    for place, line in enumerate(lines):
        for figure, value in line["scores"][model].items():
            found.setdefault(figure, {})[place] = np.nan if value is None else value
    return found


def _read_images(sealed: Artifact, cache: Path, model: str) -> dict[int, np.ndarray]:
    """The first image of each prompt that evaluate kept."""
    folder = f"images/{model.replace(' ', '-')}/"
    wanted = [name for name in sealed.sealed().files if name.startswith(folder) and name.endswith(FIRST_IMAGE)]
    fetched = sealed.fetch(cache, only=wanted.__contains__)
    return {int(Path(name).parts[2]): np.asarray(Image.open(fetched / name).convert("RGB")) for name in wanted}


def _read_curves(store: str, run: str, cache: Path) -> dict[str, list[Point]]:
    folder = Artifact(store, run, "joint").fetch(cache, only=partial(str.__eq__, "metrics.jsonl"))
    columns = read_columns(folder / "metrics.jsonl")
    return {name: points for name, points in columns.items() if name.startswith(CURVES)}
