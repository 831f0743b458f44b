"""Evaluations made in a moment: scorecards of random scores, and runs whose evaluate is sealed with one."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dmdr.metrics.aggregate import Conditions, Scores, build_scorecard
from dmdr.metrics.scorecard import Figures, Model, Scorecard, Speed
from stages.reports.gallery import encode_png
from stages.store.artifacts import Artifact
from tests.support.sealing import PROVENANCE

MODELS = [Model("student", 2, 1.0), Model("teacher", 25, 3.0), Model("naive teacher", 2, 1.0)]
GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MADE = PROVENANCE.model_copy(update={"teacher": "lab:flow"})


def speed_of(card: Figures, device: str = "cpu") -> Speed:
    """The content of speed.json; more NFE take longer."""
    seconds = {model.name: 0.25 * model.nfe for model in card.models}
    return Speed(device=device, batch_size=4, seconds_per_image=seconds)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. scores: figure -> model -> (prompts,); conditions: others of the scorecard's."""

    scores: dict[str, dict[str, np.ndarray]]
    prompts: list[str]
    trained_on: tuple[str, ...] = ()
    teacher: str = "0123456789abcdef" * 4
    models: Sequence[Model] = tuple(MODELS[:2])
    seed: int = 0
    tags: list[str | None] | None = None
    device: str = "cpu"
    conditions: dict[str, object] = field(default_factory=dict)

    def card(self, run: str) -> Scorecard:
        """The scorecard of a run."""
        tags = self.tags or [None] * len(self.prompts)
        figures = {figure: Scores(by_model, tags) for figure, by_model in self.scores.items()}
        conditions = Conditions(run, len(self.prompts), self.seed, trained_on=set(self.trained_on), **self.conditions)
        return build_scorecard(conditions, list(self.models), figures)


def seal_evaluation(store: str, run: str, scratch: Path, evaluation: Evaluation) -> Scorecard:
    """Seal evaluate, and joint with a curve; returns the card."""
    curve = "".join(f"{json.dumps({'update': n, 'reward/lab-conv': n / 9, 'loss_dm': 1.0})}\n" for n in range(9))
    claim = {"seed": evaluation.seed, "joint.updates": len(run)}, {"teacher": evaluation.teacher}
    joint, folder = Artifact(store, run, "joint"), scratch / f"{run}-joint"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(curve)
    joint.claim(*claim)
    joint.seal(folder, facts={}, provenance=MADE)
    return seal_scores(store, run, scratch, evaluation, claim)


def seal_scores(
    store: str,
    run: str,
    scratch: Path,
    evaluation: Evaluation,
    claim: tuple[dict[str, object], dict[str, str]],
) -> Scorecard:
    """Seal evaluate alone, claimed with these settings and inputs; returns the card."""
    card, scores, models = evaluation.card(run), evaluation.scores, evaluation.models
    lines = [
        {
            "index": n,
            "prompt": prompt,
            "scores": {model.name: {f: finite(by[model.name][n]) for f, by in scores.items()} for model in models},
        }
        for n, prompt in enumerate(evaluation.prompts)
    ]
    files = {
        "scorecard.json": json.dumps(card.to_json()).encode(),
        "speed.json": speed_of(card, evaluation.device).model_dump_json().encode(),
        "scores.jsonl": "".join(f"{json.dumps(line)}\n" for line in lines).encode(),
    }
    for number, model in enumerate(models):
        for place in range(min(3, len(evaluation.prompts))):
            picture = np.full((16, 16, 3), 40 * number + 10 * place + len(run), dtype=np.uint8)
            files[f"images/{model.name.replace(' ', '-')}/{place:05d}/samples/0000.png"] = encode_png(
                Image.fromarray(picture)
            )
    folder = scratch / f"{run}-evaluate"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    artifact = Artifact(store, run, "evaluate")
    artifact.claim(*claim)
    artifact.seal(folder, facts={"metrics": card.to_json()["metrics"]}, provenance=MADE)
    return card


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
