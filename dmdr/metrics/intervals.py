"""95 % intervals of means, over the prompts of one run or over several runs that differ by their seed.

For one run the interval is a percentile bootstrap over prompts, with the same resamples for all models. For several
runs it is Student's t, from the variance between seeds and between prompts. Prompts are resampled because a claim is
about prompts. All models share them, so a difference between two models is far more certain than their two means.

M models, P prompts, S seeds, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LOW, HIGH = 2.5, 97.5  # percentiles
DRAWS_AT_ONCE = 2**16  # limits the memory; the result does not depend on it


class Interval(NamedTuple):
    """A mean over prompts and the ends of its 95 % interval; all three are NaN if a score is not a number."""

    mean: float
    low: float
    high: float


def resample_means(scores_MP: np.ndarray, seed: int) -> np.ndarray:
    """scores (M, P) -> (R, M): the mean of each model on each of RESAMPLES draws of the prompts with replacement.

    The result depends on the arguments alone.
    """
    prompts = scores_MP.shape[1]
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // prompts)
    parts = []
    for first in range(0, RESAMPLES, at_once):
        indices_RP = rng.integers(prompts, size=(min(at_once, RESAMPLES - first), prompts))
        parts.append(scores_MP[:, indices_RP].mean(axis=2).T)
    return np.concatenate(parts)


def bootstrap_interval(scores_P: np.ndarray, means_R: np.ndarray) -> Interval:
    """The mean of scores (P,), with the percentiles of its resampled means (R,)."""
    if not np.isfinite(scores_P).all():
        return Interval(np.nan, np.nan, np.nan)
    low, high = np.percentile(means_R, (LOW, HIGH))
    return Interval(float(scores_P.mean()), float(low), float(high))


def bootstrap_intervals(scores_MP: np.ndarray, seed: int) -> list[Interval]:
    """One interval for each model; scores_MP: (M, P)."""
    means_RM = resample_means(scores_MP, seed)
    return [bootstrap_interval(scores_P, means_R) for scores_P, means_R in zip(scores_MP, means_RM.T, strict=True)]


def bootstrap_differences(scores_MP: np.ndarray, seed: int) -> list[Interval]:
    """The first model less each of the others, prompt by prompt, on the same resamples as `bootstrap_intervals`."""
    means_RM = resample_means(scores_MP, seed)
    return [
        bootstrap_interval(scores_MP[0] - scores_MP[m], means_RM[:, 0] - means_RM[:, m])
        for m in range(1, len(scores_MP))
    ]


def student_t_interval(scores_SP: np.ndarray) -> Interval:
    """The mean of scores (S, P) with its 95 % interval for other seeds and other prompts.

    All seeds have the same prompts. The variance of the mean is the variance between the S seeds' means over S, plus
    the variance between the P prompts' means over P. Its degrees of freedom are Satterthwaite's: a difference on which
    three seeds do not agree needs the 4.3 of Student's t with 2 degrees of freedom, not 1.96. A bootstrap of three
    seeds is too sure: where runs differ by their seed it covers the truth in 75 to 89 of 100 trials, this interval in
    93 (ours). With one seed the interval is for other prompts only.
    """
    if not np.isfinite(scores_SP).all():
        return Interval(np.nan, np.nan, np.nan)
    means = (scores_SP.mean(axis=1), scores_SP.mean(axis=0))  # of the seeds, of the prompts
    parts = [(each.var(ddof=1) / len(each), len(each) - 1) for each in means if len(each) > 1]
    variance, mean = sum(part for part, _ in parts), float(scores_SP.mean())
    if not parts:  # one seed, one prompt
        return Interval(mean, -np.inf, np.inf)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    from scipy import stats  # the image of the flows has none, and judges promotions by the bootstrap

    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Interval(mean, mean - half, mean + half)
