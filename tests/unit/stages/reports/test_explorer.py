"""The list of all prompts, and which images show nothing."""

from __future__ import annotations

import numpy as np
import pytest

from dmdr.metrics.faults import find_fault
from stages.reports.broken_images import BrokenImages, say_broken
from stages.reports.explorer import MOST_IMAGES, Prompt, build_explorer, choose_pictured, choose_side
from tests.support.evaluated import Evaluation


def test_leads_are_those_of_the_scores():
    evaluation = Evaluation(
        {"strict": {"student": np.array([1.0, 0.0, np.nan]), "teacher": np.array([0.0, 0.0, 1.0])}},
        ["a", "b", "c"],
    )
    scores = evaluation.scores["strict"]
    prompts = [
        Prompt(text, tag, {"strict": {model: float(each[n]) for model, each in scores.items()}}, (), is_broken=False)
        for n, (text, tag) in enumerate(zip("abc", ("colors", None, "colors"), strict=True))
    ]
    found = build_explorer(evaluation.card("run"), prompts)
    assert [entry.leads for entry in found.entries] == ["1", "0", ""]
    assert [entry.number for entry in found.entries] == [1, 2, 3]
    assert found.tasks == ("colors",) and found.other == "its teacher" and found.with_images == 0
    assert found.entries[2].scores == "strict: student not a number, teacher 1.00"


@pytest.mark.parametrize(("prompts", "models"), [(5, 3), (553, 3), (3200, 4), (10, 5000)])
def test_a_page_holds_so_many_images_and_no_more(prompts: int, models: int):
    places = choose_pictured(prompts, models)
    assert places and places <= set(range(prompts))
    assert len(places) * models <= max(MOST_IMAGES, models)
    if prompts * models <= MOST_IMAGES:
        assert places == set(range(prompts))
    sides = [choose_side(count) for count in (1, 300, 301, 1000, 2000, 9999)]
    assert sides == sorted(sides, reverse=True)


def paint(colour: tuple[int, int, int], side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), colour, dtype=np.uint8)


def test_images_that_show_nothing_are_told_from_those_that_do():
    rng = np.random.default_rng(0)
    assert find_fault(paint((0, 0, 0)), True) == "black"
    assert find_fault(paint((255, 250, 255), 300), True) == "white"
    assert find_fault(paint((90, 20, 200)), True) == "one colour"
    assert find_fault(paint((0, 0, 0)), False) == "not a number"
    assert find_fault(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8), True) is None
    with_object = paint((255, 255, 255))
    with_object[10:14, 10:14] = (200, 0, 0)  # the smallest object of the lab covers 14 pixels
    assert find_fault(with_object, True) is None


def test_broken_images_are_said_in_words():
    assert say_broken(BrokenImages("student", 10, (0, 0, 0, 0))) is None
    told = say_broken(BrokenImages("student", 1000, (0, 3, 1, 0)))
    assert told == "Of 1,000 images by student, 4 show nothing: 3 black, 1 white."
