"""Load the metrics that a config names, and judge images with one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.config.reward_weights import OF_JUDGE
from dmdr.errors import ConfigError, InputMissing
from dmdr.lab.checker_metric import LabChecker
from dmdr.lab.fashion.judge_metric import FashionJudge
from dmdr.metrics.dpg_bench import DPGBench
from dmdr.metrics.geneval import GenEval
from dmdr.metrics.ocr import OCR
from dmdr.metrics.protocol import Line, Metric
from dmdr.metrics.reward import RewardMetric
from dmdr.rewards.load import load_reward
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.weights import find_weights

if TYPE_CHECKING:
    from dmdr.metrics.lpips import LPIPS  # brings torchvision, which only judging needs

WITHOUT_WEIGHTS: dict[str, type[LabChecker | FashionJudge]] = {"lab-checker": LabChecker, "fashion-judge": FashionJudge}
WITH_WEIGHTS: dict[str, type[GenEval | DPGBench | OCR]] = {"geneval": GenEval, "dpg-bench": DPGBench, "ocr": OCR}
JUDGES = {*WITHOUT_WEIGHTS, *WITH_WEIGHTS, "lpips"}


@dataclass(frozen=True)
class LoadedMetrics:
    """The metrics of `evaluate.metrics`.

    lpips: separate, because it judges several images at once; None if the config does not name it. missing: name -> why
    the weights of a metric are missing, so that it was not loaded.
    """

    metrics: list[Metric]
    lpips: LPIPS | None
    missing: dict[str, str]


def check_metrics(names: tuple[str, ...], records: list[PromptRecord]) -> None:
    """Check before any image is drawn that the metrics can judge these prompts, as far as no weights are needed.

    Raises:
        ConfigError: a metric cannot judge them.
    """
    for name in names:
        if name in WITHOUT_WEIGHTS:
            WITHOUT_WEIGHTS[name]().check_prompts(records)
        elif name in WITH_WEIGHTS:
            WITH_WEIGHTS[name].check_prompts(records)


def check_resolution(names: tuple[str, ...], resolution: int) -> None:
    """Check that the metrics can judge images of this many pixels a side.

    Raises:
        ConfigError: a metric cannot.
    """
    for name in names:
        if name in WITHOUT_WEIGHTS:
            WITHOUT_WEIGHTS[name].check_size(resolution, resolution)


def load_metrics(
    names: tuple[str, ...],
    records: list[PromptRecord],
    device: str = "cpu",
    sources: RewardSources | None = None,
) -> LoadedMetrics:
    """Load metrics, and check that they can judge these prompts. names: of JUDGES or of rewards.

    sources: of the config; a set of weights that is not in it lies at its pinned address.

    Raises:
        ConfigError: a name is unknown or appears twice, or a metric cannot judge the prompts.
        InputMissing: the weights of all metrics are missing.
    """
    sources = sources or RewardSources()
    metrics: list[Metric] = []
    missing: dict[str, str] = {}
    single = [name for name in names if name != "lpips"]
    for name in single:
        try:
            metrics.append(_load_metric(name, device, sources))
        except InputMissing as error:
            missing[name] = str(error)
            if len(missing) == len(single):
                raise
    figures = [figure for metric in metrics for figure in metric.figures]
    repeated = sorted({figure for figure in figures if figures.count(figure) > 1})
    if repeated:
        raise ConfigError(f"evaluate.metrics gives {', '.join(repeated)} twice; keep one")
    for metric in metrics:
        metric.check_prompts(records)
    lpips = None
    if "lpips" in names:
        from dmdr.metrics.lpips import LPIPS

        try:
            lpips = LPIPS(find_weights("lpips-vgg16", sources.weights), device)
        except InputMissing as error:
            missing["lpips"] = str(error)
    return LoadedMetrics(metrics, lpips, missing)


def _load_metric(name: str, device: str, sources: RewardSources) -> Metric:
    if name in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[name]()
    if name in WITH_WEIGHTS:
        return WITH_WEIGHTS[name].load({each: find_weights(each, sources.weights) for each in OF_JUDGE[name]}, device)
    return RewardMetric(load_reward(name, device, sources))


def judge_images(
    metric: Metric, images: torch.Tensor, records: list[PromptRecord]
) -> tuple[dict[str, np.ndarray], Sequence[Line | None]]:
    """Judge B images. Returns figure -> scores (B,), and B lines; NaN and None for prompts that are not judged.

    An image with a value that is not a number scores NaN in every figure, and its line is marked as broken: a broken
    model must not look like one that merely drew the wrong thing.
    """
    figures = {figure: np.full(len(records), np.nan) for figure in metric.figures}
    lines: list[Line | None] = [None] * len(records)
    judged = [place for place, record in enumerate(records) if metric.judges(record)]
    if not judged:
        return figures, lines
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    scores, judged_lines = metric(images[judged].nan_to_num(0.0, 0.0, 0.0), [records[place] for place in judged])
    for row, (place, line) in enumerate(zip(judged, judged_lines, strict=True)):
        lines[place] = line if line is None or finite[place] else line.mark_broken()
        for figure in metric.figures:
            figures[figure][place] = scores[figure][row] if finite[place] else np.nan
    return figures, lines
