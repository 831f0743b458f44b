"""Describe what a figure measures, for anybody who compares it with another one: model, weights, scale and prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dmdr.config.own_rewards import OwnReward
from dmdr.config.reward_weights import OF
from dmdr.errors import InputMissing
from dmdr.metrics.lpips import FIGURE, SIDE
from dmdr.metrics.scorecard import MetricFacts
from dmdr.rewards.ocr_package import describe_ocr
from dmdr.rewards.open_clip import KINDS, PREFIXED, SCALE
from dmdr.rewards.own_code import digest_code
from dmdr.rewards.sources import RewardSources
from dmdr.rewards.weights import find_address
from dmdr.teacher import hub

MODELS = {
    "pickscore": "CLIP ViT-H/14 of PickScore v1",
    "aesthetic": "LAION aesthetic v2 on CLIP ViT-L/14",
    "imagereward": "ImageReward v1.0",
    "geneval": "Mask2Former Swin-S, colours by CLIP ViT-L/14",
    "dpg-bench": "questions answered by BLIP",
}
SCALES = {"geneval": 1.0, "ocr": 1.0, "dpg-bench": 100.0}


@dataclass(frozen=True)
class MetricDescription:
    """The description of a figure.

    weights: the sets of weights that it reads, with their addresses. scale: the perfect score or, for a cosine, its
    factor; None if there is none. prefix: the text that a CLIP score puts before each prompt, or "none"; None for
    all other figures, whose JSON lacks the key.
    """

    model: str
    weights: str
    scale: float | None = None
    prefix: str | None = None

    def to_facts(self) -> MetricFacts:
        """The description as JSON, for the scorecard."""
        facts: MetricFacts = {"model": self.model, "weights": self.weights, "scale": self.scale}
        return facts if self.prefix is None else {**facts, "prefix": self.prefix}


def describe_metrics(metrics: tuple[str, ...], sources: RewardSources) -> dict[str, MetricDescription]:
    """Figure -> its description, for the metrics that read weights, and those that a user or a package computes."""
    descriptions: dict[str, MetricDescription] = {}
    addresses = sources.weights
    for name in metrics:
        if name in sources.own:
            descriptions[name] = _describe_own(name, sources.own[name])
        elif name == "ocr":
            descriptions[name] = MetricDescription("text read and compared with the quoted one", describe_ocr(), 1.0)
        if not OF.get(name):  # the lab's metrics read none
            continue
        weights = ", ".join(_describe_weights(each, addresses) for each in OF[name])
        if name == "lpips":
            descriptions[FIGURE] = MetricDescription(f"LPIPS v0.1 on VGG-16 at {SIDE} pixels", weights)
        elif name in PREFIXED:
            prefixed = PREFIXED[name]
            descriptions[name] = MetricDescription(_describe_clip(prefixed.kind), weights, SCALE, prefixed.prefix)
        elif name in KINDS:
            descriptions[name] = MetricDescription(_describe_clip(name), weights, SCALE, "none")
        else:
            descriptions[name] = MetricDescription(MODELS[name], weights, SCALES.get(name))
    return descriptions


def _describe_own(name: str, reward: OwnReward) -> MetricDescription:
    """A reward of the user's own. Of a path only the last part is shown, as of weights."""
    if reward.url is not None:
        return MetricDescription("own reward, in another process", reward.url)
    place = reward.entry_point if reward.file is None else Path(reward.file).name
    assert place is not None, "a reward has one place"
    try:
        return MetricDescription(f"own reward {place}", f"sha256 {digest_code(name, reward)[:12]}")
    except InputMissing:
        return MetricDescription(f"own reward {place}", "not here")


def _describe_clip(kind: str) -> str:
    return f"open_clip {KINDS[kind].architecture}, images {KINDS[kind].resizing}"


def _describe_weights(weights: str, addresses: Mapping[str, str]) -> str:
    """Name a set of weights. Of a local path only the last part is shown, because the rest differs between machines."""
    try:
        address = find_address(weights, addresses)
    except InputMissing:
        return f"{weights} (not set)"
    return address if hub.is_hub(address) else f"{weights} {Path(address).name}"
