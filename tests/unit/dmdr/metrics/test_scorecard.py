"""scorecard.json: its keys and their order are a contract with everybody who reads the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from dmdr.metrics.aggregate import Conditions, Scores, build_scorecard
from dmdr.metrics.scorecard import Model, Scorecard, TagMeans

MODELS = [Model("student", 4, 1.0), Model("teacher", 25, 3.0, True)]


def example() -> Scorecard:
    scores = {model.name: np.linspace(0, 1, 6) + number for number, model in enumerate(MODELS)}
    conditions = Conditions(
        run="r",
        prompts=6,
        seed=1,
        images_per_prompt=2,
        trained_on={"soft"},
        missing={"hpsv2.1": "no weights"},
        about={"soft": {"model": "CLIP", "scale": 100.0, "prefix": None}},
        truncated=3,
    )
    means = TagMeans(tags={}, overall=None)
    categories = {"dpg-bench": {model.name: means for model in MODELS}}
    figures = {"soft": Scores(scores, ["a", "b", None] * 2), "diversity/pixels": Scores(scores, ["a"] * 6)}
    return build_scorecard(conditions, MODELS, figures, categories)


def test_the_keys_of_the_file_and_their_order():
    content = example().to_json()
    assert " ".join(content) == (
        "schema run prompts images_per_prompt intervals models metrics paired tags missing about truncated"
    )
    for part, keys in {
        "models": "name steps guidance_scale guidance_is_input label nfe",
        "metrics": "name model mean low high n broken trained_on",
        "paired": "metric a b difference low high n",
        "missing": "metric why",
    }.items():
        assert {" ".join(each) for each in content[part]} == {keys}
    assert content["models"][1] == {
        "name": "teacher",
        "steps": 25,
        "guidance_scale": 3.0,
        "guidance_is_input": True,
        "label": "teacher",
        "nfe": 25,
    }
    assert list(content["intervals"]) == ["method", "resamples", "seed"]
    assert list(content["tags"]) == ["soft", "dpg-bench"]  # none of diversity
    assert content["tags"]["soft"]["student"] == {
        "tags": {"a": {"mean": pytest.approx(0.3), "n": 2}, "b": {"mean": pytest.approx(0.5), "n": 2}},
        "overall": pytest.approx(0.4),
    }
    assert content["about"] == {"soft": {"model": "CLIP", "scale": 100.0, "prefix": None}}


def test_a_scorecard_survives_its_file():
    text = json.dumps(example().to_json(), allow_nan=False)
    assert Scorecard.model_validate_json(text) == example()
    assert json.dumps(Scorecard.model_validate_json(text).to_json()) == text


def test_a_scorecard_is_not_patched():
    with pytest.raises(ValidationError, match="frozen"):
        example().run = "other"
