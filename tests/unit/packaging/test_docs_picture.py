"""The pictures of the documents: what they show is what a sealed evaluation holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dmdr.errors import InputMissing
from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard
from docs.scripts import picture
from stages.evaluation.samples import build_sample, pack
from stages.store.artifacts import Artifact
from tests.support.sealing import PROVENANCE

COLOURS = {"student": (1.0, 0.0, 0.0), "teacher": (0.0, 1.0, 0.0), "naive teacher": (0.0, 0.0, 1.0)}
PROMPTS = 20


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A sealed evaluation in which every model draws its own colour, darker from prompt to prompt."""
    made, samples = tmp_path / "made", tmp_path / "made" / "samples"
    samples.mkdir(parents=True)
    for model, colour in COLOURS.items():
        images = [torch.tensor(colour).reshape(1, 3, 1, 1).expand(1, 3, 8, 8) * (1 - n / 40) for n in range(PROMPTS)]
        drawn = [build_sample(n, {"prompt": f"a shape {n}"}, image) for n, image in enumerate(images)]
        for shard in range(2):  # in the order of their names
            part = pack(drawn[shard * 10 : shard * 10 + 10])
            (samples / f"{model.replace(' ', '-')}-{shard:05d}.tar").write_bytes(part)
    card = Figures(
        models=tuple(ModelOnCard(name=model, steps=4, guidance_scale=1.0, nfe=4) for model in COLOURS),
        metrics=(MetricRow(name="m", model="student", mean=1, low=1, high=1, n=9, broken=0, trained_on=False),),
        paired=(),
    )
    (made / "scorecard.json").write_text(card.model_dump_json())
    artifact = Artifact(str(tmp_path / "store"), "quickstart", "evaluate")
    artifact.claim({"seed": 1}, {})
    artifact.seal(made, facts={}, provenance=PROVENANCE)
    return str(tmp_path / "store")


def test_rows_are_models_and_columns_are_prompts_evenly_spaced(store: str):
    drawn = np.asarray(picture.draw_comparison(store, "quickstart"))
    step = picture.TILE + picture.GAP
    rows = [picture.GAP + picture.HEADER + n * step + picture.TILE // 2 for n in range(3)]
    columns = [picture.GAP + picture.MARGIN + n * step + picture.TILE // 2 for n in range(picture.COLUMNS)]
    places = np.linspace(0, PROMPTS - 1, picture.COLUMNS).round()
    for row, colour in zip(rows, COLOURS.values(), strict=True):
        expected = [np.round(255 * np.array(colour) * (1 - place / 40)) for place in places]
        assert np.abs(drawn[row, columns].astype(float) - expected).max() <= 1


def test_a_run_that_is_not_evaluated_is_told(store: str):
    with pytest.raises(InputMissing, match="evaluate of run other"):
        picture.draw_comparison(store, "other")


def test_every_picture_of_what_went_wrong_is_of_a_row():
    """The page shows a strip for each row, and no other."""
    spec = picture.load_spec(picture.FOLDER / "gone-wrong.yaml")
    page = (picture.FOLDER.parent / "healthy-run.md").read_text(encoding="utf-8")
    strips = {path.stem for path in picture.FOLDER.glob("*.png")} - {"quickstart", "tune"}
    assert strips == {row.name for row in spec.rows}
    assert all(f"pictures/{row.name}.png" in page for row in spec.rows)
