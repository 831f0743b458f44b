"""DPG-Bench: its arithmetic on cases computed by hand, correctly and as the official script does; a tiny BLIP."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from dmdr.errors import ConfigError, DataError
from dmdr.metrics import dpg_rules
from dmdr.metrics.dpg_bench import AnswersLine
from dmdr.metrics.dpg_questions import Question, read_questions
from dmdr.metrics.load import check_metrics, judge_images, load_metrics
from dmdr.rewards.sources import RewardSources
from tests.support.tiny_judges import HEADER


def answers(text: str) -> dict[int, bool]:
    """ "yny" -> yes, no, yes to questions 1, 2, 3."""
    return {number: letter == "y" for number, letter in enumerate(text, 1)}


def read_table(path):
    """The questions by item, and the question of the first row."""
    read = read_questions(path)
    return read.questions, read.first


def test_a_no_zeroes_what_depends_on_it(table):
    questions, first = read_table(table)
    assert first == ("one", 1) and {item: len(asked) for item, asked in questions.items()} == {"one": 3, "two": 3}
    one, two = questions["one"], questions["two"]
    assert dpg_rules.zero_dependents(one, answers("nyy")) == {1: 0, 2: 0, 3: 0}  # on to the child's child
    assert dpg_rules.zero_dependents(one, answers("yny")) == {1: 1, 2: 0, 3: 0}
    assert dpg_rules.zero_dependents(two, answers("nyy")) == {1: 0, 2: 1, 3: 0}
    assert dpg_rules.score_image(two, answers("nyy")) == pytest.approx(1 / 3)


def test_both_ways_by_hand(table):
    questions, first = read_table(table)
    images = {"one": [answers("yyy"), answers("nyy")], "two": [answers("yyn"), answers("nyy")]}
    fixed = dpg_rules.score_correctly(questions, images)
    # one: 3/3 and 0/3; two: 2/3 and 1/3
    assert fixed.overall == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)
    means = {name: each.mean for name, each in fixed.tags.items()}
    assert means == pytest.approx(
        {
            "entity - whole": 100 * (1 + 0 + 1 + 0 + 1 + 1) / 6,
            "entity": 100 * 4 / 6,
            "attribute - color": 50.0,
            "attribute - texture": 50.0,
            "attribute": 50.0,
            "relation - spatial": 0.0,
            "relation": 0.0,
        }
    )
    assert fixed.tags["entity"].n == 2 and fixed.tags["relation"].n == 1
    # Officially: the first row is gone, so "one" fails; categories are the last image's, before zeroing.
    official = dpg_rules.score_as_published(questions, images, first)
    assert official.overall == pytest.approx(50.0)
    means = {name: each.mean for name, each in official.tags.items()}
    assert means == pytest.approx(
        {"entity - whole": 50.0, "entity": 50.0, "relation - spatial": 100.0, "relation": 100.0}
    )


def test_a_question_before_its_parent():
    """The order does not matter; the script goes through the questions once and misses the second zero."""
    asked = [Question(3, (2,), "a", "?"), Question(2, (1,), "a", "?"), Question(1, (), "a", "?")]
    assert dpg_rules.zero_dependents(asked, answers("nyy")) == {3: 0, 2: 0, 1: 0}
    official = dpg_rules.score_as_published({"one": asked}, {"one": [answers("nyy")]}, ("other", 1))
    assert official.overall == pytest.approx(100 / 3)


def test_the_script_stops_at_a_no_before_the_question_that_it_dropped():
    asked = [Question(1, (), "a", "?"), Question(2, (), "a", "?"), Question(3, (2, 1), "a", "?")]
    stopped, fails = ({"one": [answers(text)]} for text in ("yny", "yyy"))
    assert dpg_rules.score_as_published({"one": asked}, stopped, ("one", 1)).overall == 0.0
    assert dpg_rules.score_as_published({"one": asked}, fails, ("one", 1)).overall is None


def test_the_script_sees_four_images():
    asked = {"one": [Question(1, (), "a", "?")]}
    six = {"one": [answers(text) for text in "yyynnn"]}
    official = dpg_rules.score_as_published(asked, six, ("other", 1))
    assert official.model_dump() == {"tags": {"a": {"mean": 0.0, "n": 1}}, "overall": 75.0}
    assert dpg_rules.score_correctly(asked, six).overall == 50.0


def test_the_arithmetic_beside_a_naive_one():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        size = rng.randint(1, 7)
        asked = [
            Question(n, tuple(rng.sample(range(1, n), rng.randint(0, min(2, n - 1)))), rng.choice("ab"), "?")
            for n in range(1, size + 1)
        ]
        told = {n: rng.random() < 0.7 for n in range(1, size + 1)}

        def holds(number: int, asked=asked, told=told) -> bool:
            return told[number] and all(holds(parent) for parent in asked[number - 1].parents)

        expected = sum(holds(n) for n in told) / size
        assert dpg_rules.score_image(asked, told) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("item_id,text\n", "lacks the column proposition_id, dependency, tuple"),
        (HEADER, "has no questions"),
        (HEADER + "one,t,,1,none,e,w,e (x),q?\n", "line 2: invalid literal"),
        (HEADER + "one,t,,1,4,e,w,e (x),q?\n", "question 1 of one depends on 4"),
        (HEADER + "one,t,,1,0,e,w\n", "line 2: ends before tuple"),
        (HEADER + 'one,t,,1,0,e,w,"e (x),q?\n', "cannot be read as CSV"),
        (HEADER + "one,t,,1,0,e,w,e (x),q?\n" * 2, "one has a question twice"),
        (HEADER + "one,t,,1,2,e,w,e (x),q?\none,t,,2,1,e,w,e (x),q?\n", "questions 1, 2 of one depend on each other"),
    ],
)
def test_a_broken_file_of_questions_is_named(tmp_path, text, says):
    (tmp_path / "broken.csv").write_text(text)
    with pytest.raises(DataError, match=rf"broken\.csv.*{says}"):
        read_questions(tmp_path / "broken.csv")


def test_what_is_no_text_file_of_questions_is_named(tmp_path):
    (tmp_path / "latin.csv").write_bytes((HEADER + "one,tö,,1,0,e,w,e (x),q?\n").encode("latin-1"))
    (tmp_path / "folder.csv").mkdir()
    for name in ("latin.csv", "folder.csv"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as CSV"):
            read_questions(tmp_path / name)


def test_the_metric_asks_about_each_image(table, tiny_blip):
    weights = {"dpg-questions": str(table), "vqa": str(tiny_blip)}
    records = [{"prompt": "a red dog", "item_id": "one"}, {"prompt": "a cup", "item_id": "two"}, {"prompt": "else"}]
    loaded = load_metrics(("dpg-bench",), records, sources=RewardSources(weights))
    (metric,) = loaded.metrics
    assert loaded.missing == {} and [metric.judges(record) for record in records] == [True, True, False]
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(5))
    scores, lines = judge_images(metric, images, records)
    assert np.isnan(scores["dpg-bench"][2]) and lines[2] is None
    again, lines_again = judge_images(metric, images[1:2], records[1:2])
    assert again["dpg-bench"][0] == scores["dpg-bench"][1] and lines_again[0] == lines[1]
    questions, first = read_table(table)
    told = {line.item_id: [{int(n): a == "yes" for n, a in line.answers.items()}] for line in lines[:2]}
    assert metric.average_by_category(lines[:2]) == {
        "dpg-bench": dpg_rules.score_correctly(questions, told),
        "dpg-bench (official)": dpg_rules.score_as_published(questions, told, first),
    }
    assert [AnswersLine(**json.loads(json.dumps(line.to_json()))) for line in lines[:2]] == lines[:2]
    assert list(lines[0].to_json()) == ["item_id", "answers"]
    images[1, 0, 0, 0] = torch.nan
    scores, lines = judge_images(metric, images, records)
    assert np.isnan(scores["dpg-bench"][1]) and lines[1] == AnswersLine("two", None)
    for of_figure in metric.average_by_category(lines[:2]).values():
        assert of_figure.overall is None and {each.mean for each in of_figure.tags.values()} == {None}
    with pytest.raises(ConfigError, match="has an item_id"):
        check_metrics(("dpg-bench",), [{"prompt": "a dog"}])
