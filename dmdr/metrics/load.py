"""What a scorecard is made of: a metric gives every image one number under each of its figures' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from dmdr.config.reward_weights import OF_JUDGE
from dmdr.errors import ConfigError, InputMissing
from dmdr.lab.checker_metric import LabChecker
from dmdr.lab.fashion.judge_metric import FashionJudge
from dmdr.metrics.dpg_bench import DPGBench
from dmdr.metrics.geneval import GenEval
from dmdr.metrics.lpips import LPIPS
from dmdr.metrics.reward import RewardMetric
from dmdr.promptset import PromptRecord
from dmdr.rewards.load import load_reward
from dmdr.rewards.weights import find_weights

RESULTS = "results"  # lines as GenEval's scripts write and read them


class Metric(Protocol):
    """Higher is better in every figure."""

    figures: tuple[str, ...]
    writes: str | None  # the file that its lines go to, <writes>-<model>.jsonl

    def judges(self, record: PromptRecord) -> bool:
        """Whether it has anything to say about this prompt."""

    def check_prompts(self, records: list[PromptRecord]) -> None:
        """ConfigError when these prompts cannot be judged at all."""

    def __call__(
        self, images: torch.Tensor, records: list[PromptRecord]
    ) -> tuple[dict[str, np.ndarray], list[dict | None]]:
        """Scores (B,) by figure of images (B, 3, H, W) in [0, 1], and B lines of its file, or None."""


WITHOUT_WEIGHTS = {"lab-checker": LabChecker, "fashion-judge": FashionJudge}
WITH_WEIGHTS = {"geneval": GenEval, "dpg-bench": DPGBench}
JUDGES = {*WITHOUT_WEIGHTS, *WITH_WEIGHTS, "lpips"}


def check_metrics(names: tuple[str, ...], records: list[PromptRecord]) -> None:
    """Whether the metrics can judge these prompts, as far as that shows without weights, before anything is drawn.

    Raises:
        ConfigError: one cannot.
    """
    for name in names:
        if name in WITHOUT_WEIGHTS:
            WITHOUT_WEIGHTS[name]().check_prompts(records)
        elif name in WITH_WEIGHTS:
            WITH_WEIGHTS[name].check_prompts(records)


def load_metrics(
    names: tuple[str, ...], records: list[PromptRecord], device: str = "cpu", addresses: Mapping[str, str] | None = None
) -> tuple[list[Metric], dict[str, str]]:
    """The metrics of `evaluate.metrics`, each one of JUDGES or a reward's name, and able to judge these prompts. And
    those whose weights are not there, each with the reason.

    addresses: the config's `weights`, where they are not the pinned ones.

    Raises:
        ConfigError: an unknown or repeated name, or prompts that a metric cannot judge.
        InputMissing: no metric is left.
    """
    found: list[Metric] = []
    missing: dict[str, str] = {}
    images = [name for name in names if name != "lpips"]  # which is about several at once
    for name in images:
        try:
            found.append(_load_metric(name, device, addresses or {}))
        except InputMissing as error:
            missing[name] = str(error)
            if len(missing) == len(images):
                raise
    figures = [figure for metric in found for figure in metric.figures]
    repeated = sorted({figure for figure in figures if figures.count(figure) > 1})
    if repeated:
        raise ConfigError(f"evaluate.metrics gives {', '.join(repeated)} twice; keep one")
    for metric in found:
        metric.check_prompts(records)
    return found, missing


def load_lpips(
    names: tuple[str, ...], device: str, addresses: Mapping[str, str]
) -> tuple[LPIPS | None, dict[str, str]]:
    """LPIPS if `evaluate.metrics` has it, and as of `load`, why it is missing."""
    if "lpips" not in names:
        return None, {}
    try:
        return LPIPS(find_weights("lpips-vgg16", addresses), device), {}
    except InputMissing as error:
        return None, {"lpips": str(error)}


def _load_metric(name: str, device: str, addresses: Mapping[str, str]) -> Metric:
    if name in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[name]()
    if name in WITH_WEIGHTS:
        return WITH_WEIGHTS[name].load({each: find_weights(each, addresses) for each in OF_JUDGE[name]}, device)
    return RewardMetric(load_reward(name, device, addresses))


def judge_images(
    metric: Metric, images: torch.Tensor, records: list[PromptRecord]
) -> tuple[dict[str, np.ndarray], list[dict | None]]:
    """Scores (B,) by figure and B lines; NaN and None for prompts that the metric does not judge.

    An image that is not a number scores NaN under every figure, is incorrect in a line of GenEval's and has
    no answers in one of DPG-Bench's: a broken model must not look like one that merely drew the wrong thing.
    """
    figures = {figure: np.full(len(records), np.nan) for figure in metric.figures}
    lines: list[dict | None] = [None] * len(records)
    judged = [place for place, record in enumerate(records) if metric.judges(record)]
    if not judged:
        return figures, lines
    sound = images.isfinite().flatten(1).all(dim=1).tolist()
    found, results = metric(images[judged].nan_to_num(0.0, 0.0, 0.0), [records[place] for place in judged])
    for row, place in enumerate(judged):
        lines[place] = results[row]
        if results[row] is not None and not sound[place]:
            broken = {"correct": False, "reason": "the image is not a number", "details": "{}"}
            lines[place] = results[row] | (broken if metric.writes == RESULTS else {"answers": None})
        for figure in metric.figures:
            figures[figure][place] = found[figure][row] if sound[place] else np.nan
    return figures, lines
