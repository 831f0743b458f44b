"""Intervals against theory and brute force; the checker's lines against an independent GenEval summary."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from dmdr.errors import ConfigError
from dmdr.lab.checker_metric import LabChecker
from dmdr.lab.prompts import lab_prompts
from dmdr.lab.world import render_images
from dmdr.metrics.aggregate import Conditions, Scores, build_scorecard
from dmdr.metrics.diversity import diversity
from dmdr.metrics.intervals import (
    RESAMPLES,
    bootstrap_differences,
    bootstrap_intervals,
    resample_means,
    student_t_interval,
)
from dmdr.metrics.load import judge_images, load_metrics
from dmdr.metrics.scorecard import Model

MODELS = [Model("student", 4, 1.0), Model("teacher", 25, 3.0)]


def renders(records: list[dict], seed: int = 0) -> torch.Tensor:
    """True drawings of the records, (B, 3, 32, 32) in [0, 1]."""
    images = render_images(records, np.random.default_rng(seed))
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_intervals_cover_the_true_mean():
    rng = np.random.default_rng(5)
    trials, covered = 160, 0
    for trial in range(trials):
        (found,) = bootstrap_intervals((rng.random((1, 80)) < 0.3).astype(float), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / trials <= 0.99  # 95 %, less what 80 prompts and 160 trials blur


def test_interval_is_the_exact_bootstrap_on_few_prompts():
    scores = np.array([[0.1, 0.9, 0.4, 0.7, 0.3], [0.5, 0.2, 0.4, 0.1, 0.0]])
    every = np.array(list(itertools.product(range(5), repeat=5)))  # all 3,125 resamples of five prompts
    lead = scores[0] - scores[1]
    low, high = np.percentile(lead[every].mean(axis=1), (2.5, 97.5))
    (found,) = bootstrap_differences(scores, seed=1)
    assert found.mean == pytest.approx(lead.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_models_share_their_resamples():
    scores = np.random.default_rng(0).random((3, 40))
    means = resample_means(np.concatenate([scores, np.eye(40)]), seed=7)  # eye: how often each prompt was drawn
    drawn = means[:, 3:] * 40
    assert drawn.shape == (RESAMPLES, 40)
    assert np.allclose(drawn, drawn.round())
    assert np.allclose(drawn.sum(axis=1), 40)
    naive = [[sum(n * s for n, s in zip(counts, row, strict=True)) / 40 for row in scores] for counts in drawn[:5]]
    assert np.allclose(means[:5, :3], naive)
    assert drawn.std() == pytest.approx(1, abs=0.05)  # binomial(40, 1 / 40)


def test_pairing_sees_a_small_lead_through_prompt_noise():
    difficulty = np.random.default_rng(1).random(200)
    (paired,) = bootstrap_differences(np.stack([difficulty + 0.02, difficulty]), seed=0)
    student, teacher = bootstrap_intervals(np.stack([difficulty + 0.02, difficulty]), seed=0)
    assert student.low < teacher.high  # the means alone decide nothing
    assert paired.low == pytest.approx(0.02)


@pytest.mark.parametrize(("between_seeds", "between_prompts"), [(0.0, 0.3), (0.05, 0.1), (0.2, 0.1)])
def test_intervals_over_seeds_cover_the_truth_with_three_of_them(between_seeds: float, between_prompts: float):
    rng = np.random.default_rng(11)
    trials, covered = 500, 0
    for _ in range(trials):
        seeds, prompts = between_seeds * rng.normal(size=(3, 1)), between_prompts * rng.normal(size=(1, 80))
        found = student_t_interval(0.5 + seeds + prompts + 0.3 * rng.normal(size=(3, 80)))
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / trials <= 0.99


def test_an_interval_over_seeds_is_students_t_where_only_one_kind_varies():
    of_seeds, of_prompts = np.array([0.2, 0.5, 0.8]), np.array([0.1, 0.4, 0.9, 0.2, 0.3])
    for scores, each, t in (
        (
            np.repeat(of_seeds[:, None], 5, axis=1),
            of_seeds,
            4.3027,
        ),  # tables of Student's t, 2 and 4 degrees of freedom
        (np.repeat(of_prompts[None], 3, axis=0), of_prompts, 2.7764),
        (of_prompts[None], of_prompts, 2.7764),  # one seed
    ):
        found = student_t_interval(scores)
        half = t * each.std(ddof=1) / len(each) ** 0.5
        assert found == pytest.approx((each.mean(), each.mean() - half, each.mean() + half), abs=1e-4)
    assert student_t_interval(np.full((3, 4), 0.5)) == (0.5, 0.5, 0.5)
    assert student_t_interval(np.full((1, 1), 0.5)) == (0.5, -np.inf, np.inf)
    assert np.isnan(student_t_interval(np.array([[0.5, np.nan]]))).all()


def test_checker_passes_true_renders_and_fails_others():
    records = list(lab_prompts("held-out")[:60])
    figures, lines = judge_images(LabChecker(), renders(records), records)
    assert figures["strict"].mean() > 0.95
    assert figures["soft"].min() > 0.5
    shifted_figures, _ = judge_images(LabChecker(), torch.roll(renders(records), 1, dims=0), records)
    assert shifted_figures["strict"].mean() < 0.3
    keys = {"tag", "prompt", "correct", "reason", "metadata", "details"}  # and the file name, which evaluate knows
    assert all(
        set(line.to_json()) == keys and line.metadata == json.dumps(r) for line, r in zip(lines, records, strict=True)
    )


def test_geneval_overall_equals_an_independent_summary():
    records = list(lab_prompts("held-out")[:90])
    images = torch.roll(renders(records), 1, dims=0)
    images[::2] = renders(records)[::2]
    figures, lines = judge_images(LabChecker(), images, records)
    scores = Scores({"student": figures["strict"], "teacher": figures["strict"]}, [r["tag"] for r in records])
    card = build_scorecard(Conditions("r", prompts=90, seed=0), MODELS, {"strict": scores})

    tasks: dict[str, list[bool]] = {}  # as summary_scores.py of djghosh13/geneval does it, from the lines alone
    for line in (json.loads(json.dumps(each.to_json())) for each in lines):
        tasks.setdefault(line["tag"], []).append(line["correct"])
    overall = np.mean([np.mean(correct) for correct in tasks.values()])
    means = card.tags["strict"]["student"]
    assert means.overall == pytest.approx(overall, abs=1e-9)
    assert {tag: each.n for tag, each in means.tags.items()} == {tag: len(correct) for tag, correct in tasks.items()}


def test_a_broken_image_is_not_a_number_everywhere():
    records = list(lab_prompts("held-out")[:8])
    images = renders(records)
    images[3, 0, 0, 0] = float("nan")
    figures, lines = judge_images(LabChecker(), images, records)
    assert np.flatnonzero(np.isnan(figures["strict"])).tolist() == [3]
    assert lines[3].correct is False
    assert "not a number" in lines[3].reason
    scores = Scores({"student": figures["strict"], "teacher": np.ones(8)}, [r["tag"] for r in records])
    conditions = Conditions("r", prompts=8, seed=0, trained_on={"strict"})
    card = build_scorecard(conditions, MODELS, {"strict": scores})
    student, teacher = card.metrics
    assert (student.mean, student.low, student.high, student.broken) == (None, None, None, 1)
    assert (teacher.mean, teacher.broken, teacher.trained_on) == (1.0, 0, True)
    assert card.paired[0].difference is None
    assert card.tags["strict"]["student"].overall is None
    json.dumps(card.to_json(), allow_nan=False)


def test_diversity_is_zero_of_equal_images_and_one_of_black_and_white():
    black, white = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    broken = torch.full((3, 4, 4), float("nan"))
    of_prompts = [white, white, white], [black, white, white], [black, broken, white]
    images = torch.stack([torch.stack(each) for each in of_prompts])
    found = diversity(
        images, {"up": lambda x: torch.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], dim=1)}
    )  # at right angles
    assert found["diversity/pixels"] == pytest.approx([0, 2 / 3, np.nan], nan_ok=True)
    assert found["diversity/up"] == pytest.approx([0, 2 / 3, np.nan], nan_ok=True)


def test_prompts_without_metadata_are_left_out_and_counted():
    records = [*lab_prompts("held-out")[:4], {"prompt": "a lighthouse at night"}]
    images = torch.cat([renders(records[:4]), torch.zeros(1, 3, 32, 32)])
    figures, lines = judge_images(load_metrics(("lab-checker",), records).metrics[0], images, records)
    assert np.isnan(figures["strict"]).tolist() == [False] * 4 + [True]
    assert lines[4] is None


@pytest.mark.parametrize(
    ("names", "records", "said"),
    [
        (("lab-checker",), [{"prompt": "a dog"}], "none of the 1 evaluation prompts"),
        (("lab-checker",), [{"prompt": "a dog", "tag": "x", "include": [{"class": "dog", "count": 1}]}], "ask for dog"),
        (("lab-checker", "lab-checker"), list(lab_prompts("held-out")[:2]), "twice"),
        (("no-such-reward",), [{"prompt": "a dog"}], "no-such-reward"),
    ],
)
def test_metrics_that_cannot_judge_are_refused(names, records, said):
    with pytest.raises(ConfigError, match=said):
        load_metrics(names, records)


def test_checker_refuses_images_of_another_size():
    records = list(lab_prompts("held-out")[:1])
    with pytest.raises(ConfigError, match="16x16"):
        judge_images(LabChecker(), torch.zeros(1, 3, 16, 16), records)


def test_guidance_doubles_the_forwards():
    assert [model.nfe for model in MODELS] == [4, 50]
