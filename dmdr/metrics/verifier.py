"""Metrics as rewards: `geneval`, `ocr` and the lab's exact checker judge an image by what its prompt asks for.

1. They have no gradient. What a run trained on is marked on its scorecard, whatever figure measures the same.
2. Every training prompt must say what its image must show, or a score would mean nothing.
3. The checker decides on the held-out prompts, so nothing may train on those. Elsewhere it is a reward like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch

from dmdr.config.prompt_record import PromptRecord
from dmdr.config.reward_weights import OF, VERIFIERS
from dmdr.errors import ConfigError
from dmdr.lab.checker_metric import LabChecker
from dmdr.lab.prompts import lab_prompts
from dmdr.lab.vocabulary import SHAPES
from dmdr.metrics.geneval import GenEval, find_fault
from dmdr.metrics.geneval_rules import count_detections, score_softly
from dmdr.metrics.ocr import OCR
from dmdr.rewards.load import load_reward
from dmdr.rewards.protocol import Reward
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.uncounted import Uncounted
from dmdr.rewards.weights import find_weights

Judge = Callable[[torch.Tensor, list[PromptRecord]], np.ndarray]  # images (B, 3, H, W) and their records -> (B,)


class Verifier:
    """A metric as a reward.

    Raises:
        ConfigError: when it is called without what its prompts ask for.
    """

    differentiable = False

    def __init__(self, name: str, judge: Judge) -> None:
        self.name, self.judge = name, judge

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[PromptRecord] = ()) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> scores (B,) in [0, 1]; NaN for an image that is not a number."""
        records = list(metadata) or [PromptRecord(prompt=prompt) for prompt in prompts]
        for record in records:
            if fault := find_lack(self.name, record):
                raise ConfigError(
                    f"the reward {self.name} cannot judge an image of {record['prompt']!r}, which {fault}"
                )
        finite = images.isfinite().flatten(1).all(dim=1)
        scores = torch.from_numpy(self.judge(images.nan_to_num(0.0, 0.0, 0.0), records)).float().to(images.device)
        return scores.masked_fill(~finite, torch.nan)


def load_any_reward(name: str, device: str = "cpu", sources: RewardSources | None = None) -> Reward:
    """Load a reward by name: a verifier, or what `load_reward` loads. Raises as `load_reward`.

    On the device "meta" a verifier costs nothing: its networks see images without a graph, a few at a time.
    """
    if name not in VERIFIERS:
        return load_reward(name, device, sources)
    if device == "meta":
        return Uncounted(name)
    weights = {each: find_weights(each, (sources or RewardSources()).weights) for each in OF[name]}
    match name:
        case "ocr":
            return Verifier(name, partial(_judge_figure, OCR.load(weights, device), "ocr"))
        case "geneval":
            return Verifier(name, partial(_judge_figure, GenEval.load(weights, device), "geneval"))
        case "geneval-soft":
            return Verifier(name, partial(_judge_softly, GenEval.load(weights, device)))
    return Verifier(name, partial(_judge_figure, LabChecker(), "soft" if name == "lab-checker-soft" else "strict"))


def _judge_figure(
    metric: GenEval | OCR | LabChecker, figure: str, images: torch.Tensor, records: list[PromptRecord]
) -> np.ndarray:
    figures, _ = metric(images, records)
    return figures[figure]


def _judge_softly(geneval: GenEval, images: torch.Tensor, records: list[PromptRecord]) -> np.ndarray:
    scores = [
        score_softly(record, count_detections(detected, record["tag"]), partial(geneval.colours, image))
        for image, record, detected in zip(images, records, geneval.detector(images), strict=True)
    ]
    return np.array(scores)


def find_lack(name: str, record: PromptRecord) -> str:
    """What a verifier misses in a prompt, as the end of "which ..."; empty if nothing."""
    if name == "ocr":
        return "" if OCR.judges(record) else "has no text in quotation marks"
    if not GenEval.judges(record):
        return "has no metadata (tag, include)"
    if name.startswith("geneval"):
        return find_fault(record)
    foreign = {need["class"] for need in record["include"]}.difference(SHAPES)
    return f"asks for {min(foreign)}, which the lab's checker does not know" if foreign else ""


class TrainingPrompts:
    """Looks at training prompts, one after another, for what the verifiers among the rewards `names` ask of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.total, self.lacking = 0, dict.fromkeys((name for name in names if name in VERIFIERS), 0)
        self.first: dict[str, str] = {}
        checks = any(name.startswith("lab-checker") for name in self.lacking)
        self.held_out = {record["prompt"] for record in lab_prompts("held-out")} if checks else set[str]()

    def look(self, record: PromptRecord) -> None:
        """Look at one prompt."""
        self.total += 1
        for name in self.lacking:
            fault = find_lack(name, record)
            if not fault and name.startswith("lab-checker") and record["prompt"] in self.held_out:
                fault = "is one of lab:held-out, on which the checker decides"
            if fault:
                self.lacking[name] += 1
                self.first.setdefault(name, f"{record['prompt']!r}, which {fault}")

    def refuse_lacking(self) -> None:
        """
        Raises:
            ConfigError: a verifier cannot judge some of the prompts, or may not. It says how many, and names the first.
        """
        for name, count in self.lacking.items():
            if count:
                raise ConfigError(
                    f"rl.rewards has {name}, but {count:,} of {self.total:,} training prompts are not for it, "
                    f"the first {self.first[name]}; take them out of prompts.sources, or drop {name}"
                )


def check_training_prompts(names: Iterable[str], records: Iterable[PromptRecord]) -> None:
    """Refuse training prompts that a verifier among `names` cannot judge, or may not. Raises as TrainingPrompts."""
    prompts = TrainingPrompts(names)
    if prompts.lacking:
        for record in records:
            prompts.look(record)
        prompts.refuse_lacking()
