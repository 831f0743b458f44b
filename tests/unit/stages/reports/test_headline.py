"""The sentences on top of a report: all held-out metrics, losses like wins, speed and cost as they were measured."""

from __future__ import annotations

import pytest

from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard, PairedDifference, Speed
from stages.reports.headline import build_headline, list_plain_sentences
from stages.reports.sentences import join_phrases
from stages.reports.stage_times import StageTime, format_effort, select_training, sum_training
from stages.reports.verdict import judge_pair

STUDENT = ModelOnCard(name="student", steps=4, guidance_scale=1.0, nfe=4)
TEACHER = ModelOnCard(name="teacher", steps=25, guidance_scale=3.0, nfe=50)
WIN, LOSS, SAME, BROKEN = (0.07, 0.05, 0.09), (-0.03, -0.05, -0.01), (0.01, -0.02, 0.04), (None, None, None)
Ends = tuple[float | None, float | None, float | None]


def card_of(figures: dict[str, Ends], trained_on: tuple[str, ...] = (), other: ModelOnCard = TEACHER) -> Figures:
    """A scorecard of two models. figures: metric -> difference, low, high."""
    metrics = tuple(
        MetricRow(name=f, model=m.name, mean=0.5, low=0.4, high=0.6, n=9, broken=0, trained_on=f in trained_on)
        for f in figures
        for m in (STUDENT, other)
    )
    paired = tuple(
        PairedDifference(metric=f, a="student", b=other.name, difference=mean, low=low, high=high)
        for f, (mean, low, high) in figures.items()
    )
    return Figures(models=(STUDENT, other), metrics=metrics, paired=paired)


def test_a_win_behind_a_metric_that_shows_nothing_is_not_overlooked():
    verdict = judge_pair(card_of({"strict": SAME, "mixer": WIN}), "teacher")
    assert verdict.outcome == "better"
    assert verdict.text == (
        "The 4-step student is better than its teacher in 1 of 2 held-out measures and worse in none: "
        "mixer 0.500 against 0.500, +0.070 [+0.050, +0.090]."
    )


def test_losses_are_said_as_loudly_as_wins():
    verdict = judge_pair(card_of({"a": WIN, "b": LOSS, "c": LOSS, "d": SAME}), "teacher")
    assert verdict.outcome == "mixed"
    loud = {phrase.text: phrase.tone for sentence in verdict.sentences for phrase in sentence if phrase.tone}
    assert loud == {"better than its teacher in 1": "better", "worse in 2": "worse"}
    assert "b 0.500 against 0.500, -0.030 [-0.050, -0.010]" in verdict.text
    worse = judge_pair(card_of({"a": SAME, "b": LOSS}), "teacher")
    assert worse.outcome == "worse" and "worse than its teacher in 1 of 2" in worse.text


@pytest.mark.parametrize("figures", [{"a": SAME}, {"a": SAME, "b": SAME}])
def test_no_difference_is_said_only_where_no_interval_excludes_0(figures):
    verdict = judge_pair(card_of(figures), "teacher")
    assert verdict.outcome == "same"
    assert verdict.text.startswith("No difference between the 4-step student and its teacher is shown by ")
    assert all(f"{figure} 0.500" in verdict.text for figure in figures)


def test_what_was_trained_on_never_counts():
    verdict = judge_pair(card_of({"a": WIN, "b": LOSS}, trained_on=("a",)), "teacher")
    assert verdict.outcome == "worse" and "the one held-out measure" in verdict.text
    assert verdict.also == "a +0.070, better"
    nothing = judge_pair(card_of({"a": WIN}, trained_on=("a",)), "teacher")
    assert nothing.outcome == "undecided" and "no measure here is held out" in nothing.text


def test_less_diversity_is_said_and_more_is_no_merit():
    less = judge_pair(card_of({"a": SAME, "diversity/pixels": LOSS}), "teacher")
    assert less.outcome == "same"
    assert "Its images of one prompt are less varied than its teacher's: diversity/pixels -0.030" in less.text
    more = judge_pair(card_of({"a": SAME, "diversity/pixels": WIN}), "teacher")
    assert "varied" not in more.text


def test_what_is_not_a_number_decides_nothing():
    some = judge_pair(card_of({"a": WIN, "b": BROKEN}), "teacher")
    assert some.outcome == "better" and "Undecided: b, a score is not a number." in some.text
    alone = judge_pair(card_of({"a": BROKEN}), "teacher")
    assert alone.outcome == "undecided" and "cannot be compared with its teacher" in alone.text


def timed(student: float, teacher: float, device: str = "2 threads of a CPU") -> Speed:
    return Speed(device=device, batch_size=4, seconds_per_image={"student": student, "teacher": teacher})


TRAINING = [
    StageTime("cold_start", "cpu", 1, seconds=300, cpu_seconds=600, peak_mib=512, adopted_from=None),
    StageTime("joint", "cpu", 1, seconds=600, cpu_seconds=1200, peak_mib=512, adopted_from=None),
]


def test_speed_and_cost_are_those_that_were_measured():
    headline = build_headline(card_of({"a": WIN}), timed(0.1, 1.1), TRAINING)
    _, speed, cost = map(join_phrases, headline.sentences)
    assert speed == (
        "The student needs 4 evaluations of the network for an image instead of 50, 12.5 times fewer, and 0.1 s "
        "instead of 1.1 s on 2 threads of a CPU, 11 times as fast."
    )
    assert cost == "Its training took 0.5 CPU-hours (cold start and joint), won back after 900 images."


def test_a_slower_model_wins_no_time_back():
    headline = build_headline(card_of({"a": WIN}), timed(2.0, 1.0), TRAINING)
    _, speed, cost = map(join_phrases, headline.sentences)
    assert speed.endswith("2 times as slow.") and "won back" not in cost


def test_what_is_not_known_is_not_said():
    headline = build_headline(card_of({"a": WIN}), Speed(device="cpu", batch_size=1, seconds_per_image={}), [])
    assert [join_phrases(each) for each in headline.sentences][1:] == [
        "The student needs 4 evaluations of the network for an image instead of 50, 12.5 times fewer."
    ]
    on_gpu = build_headline(card_of({"a": WIN}), timed(0.1, 1.1, "NVIDIA H200"), TRAINING)  # other than in training
    assert "won back" not in join_phrases(on_gpu.sentences[2])


def test_only_times_differ_between_two_runs():
    """All else stays, so that two pages can be compared without what they measured."""
    pages = [build_headline(card_of({"a": WIN}), timed(*seconds), TRAINING) for seconds in ((0.1, 1.1), (3.0, 1.1))]
    kept = [[[p for p in sentence if not p.measured] for sentence in page.sentences] for page in pages]
    assert kept[0] == kept[1]


def test_a_terminal_gets_the_same_sentences():
    card = card_of({"a": WIN, "b": LOSS})
    assert list_plain_sentences(card)[0] == judge_pair(card, "teacher").text
    assert list_plain_sentences(card)[1].endswith("12.5 times fewer.")


def test_each_model_went_through_its_own_training():
    assert select_training("student", TRAINING) == TRAINING
    assert select_training("cold start", TRAINING) == TRAINING[:1]
    assert select_training("teacher", TRAINING) == []
    assert select_training("somebody's", TRAINING) is None
    models = ["student", "teacher", "cold start", "somebody's"]
    assert sum_training(models, TRAINING) == ("cpu", {"student": 1800, "teacher": 0, "cold start": 600})
    assert sum_training(["teacher"], TRAINING) is None
    assert select_training("student", TRAINING[:1]) is None  # the time of its joint training is not known
    assert sum_training(models, TRAINING[:1]) == ("cpu", {"teacher": 0, "cold start": 600})


@pytest.mark.parametrize(
    ("seconds", "device", "text"),
    [(2.5, "cpu", "2.5 CPU-seconds"), (120, "cuda", "2 GPU-minutes"), (7200, "cuda", "2.0 GPU-hours")],
)
def test_effort_is_told_in_units_that_people_use(seconds, device, text):
    assert format_effort(seconds, device) == text
