"""Quoted texts, and how much of them was read: against a naive edit distance, and for real with the OCR package."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from dmdr.errors import ConfigError
from dmdr.metrics.quoted_text import count_edits, list_quotes, score_text
from dmdr.metrics.verifier import check_training_prompts, load_any_reward


@pytest.mark.parametrize(
    ("prompt", "quotes"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a cup with the words “Good day” and ‘Tea’", ["Good day", "Tea"]),
        ("a shop's window with 'Sale' in it, the owner's cat", ["Sale"]),
        ("«Café» und „Bar“", ["Café", "Bar"]),
        ("no text at all", []),
        ('empty "" and "  "', []),
        ("the dogs' bowls and the cats' bowls", []),
    ],
)
def test_quotes_of_a_prompt(prompt, quotes):
    assert list_quotes(prompt) == quotes


def naive(a: str, b: str) -> int:
    @functools.cache
    def edits(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return edits(len(a), len(b))


def test_the_edit_distance_is_the_naive_one():
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(2))
        assert count_edits(a, b) == naive(a, b), (a, b)


@pytest.mark.parametrize(
    ("quotes", "lines", "score"),
    [
        (["OPEN"], ["open"], 1.0),
        (["Good day"], ["GOOD", "DAY"], 1.0),
        (["Tea", "Cake"], ["Cake", "Tea"], 1.0),
        (["OPEN"], ["OPEM"], 0.75),
        (["OPEN"], [], 0.0),
        (["OPEN"], ["OPEN", "abcd"], 0.5),
    ],
)
def test_scores_by_hand(quotes, lines, score):
    assert score_text(quotes, lines) == pytest.approx(score)


def draw(text: str, side: int = 160) -> torch.Tensor:
    """Black text on white: (1, 3, side, side) in [0, 1]."""
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text((12, side // 3), text, fill="black", font=ImageFont.load_default(34))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def test_rendered_text_is_read():
    pytest.importorskip("rapidocr", reason="pip install 'dmdr[ocr]'")
    reward = load_any_reward("ocr")
    prompts = [{"prompt": 'a sign that says "OPEN"'}, {"prompt": 'a sign that says "MOON"'}]
    right, wrong = (float(reward(draw("OPEN"), [each["prompt"]], [each])) for each in prompts)
    plain = float(reward(torch.full((1, 3, 64, 64), 0.5), ["x"], prompts[:1]))
    assert right == 1.0 and 0 < wrong < 0.7 and plain == 0.0


def test_training_prompts_that_a_verifier_cannot_judge_are_counted():
    records = [{"prompt": 'says "A"'}, {"prompt": "says nothing"}, {"prompt": "nor this"}]
    with pytest.raises(ConfigError, match="has ocr, but 2 of 3 training prompts .*, the first 'says nothing'"):
        check_training_prompts(["ocr", "pickscore"], records)
    check_training_prompts(["ocr"], records[:1])
    check_training_prompts(["pickscore"], records)
    with pytest.raises(ConfigError, match=r"has geneval, but 3 of 3 .* no metadata \(tag, include\)"):
        check_training_prompts(["geneval"], records)
    other = [{"prompt": "a unicorn", "tag": "single_object", "include": [{"class": "unicorn", "count": 1}]}]
    with pytest.raises(ConfigError, match="asks for unicorn, which its detector does not know"):
        check_training_prompts(["geneval-soft"], other)


def test_the_checker_trains_on_training_prompts_alone():
    from dmdr.lab.prompts import lab_prompts

    check_training_prompts(["lab-checker"], lab_prompts("train")[:200])
    with pytest.raises(ConfigError, match="1 of 6 training prompts .* is one of lab:held-out, on which the checker"):
        check_training_prompts(["lab-checker"], [*lab_prompts("train")[:5], lab_prompts("held-out")[0]])
