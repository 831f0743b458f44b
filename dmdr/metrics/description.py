"""What a figure is: model, weights, scale and what stands before a prompt, for whoever compares it with another's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmdr.config.reward_weights import OF
from dmdr.errors import InputMissing
from dmdr.metrics.lpips import FIGURE, SIDE
from dmdr.metrics.scorecard import MetricFacts
from dmdr.rewards.open_clip import KINDS, PREFIXED, SCALE
from dmdr.rewards.weights import address_of
from dmdr.teacher import hub

MODELS = {
    "pickscore": "CLIP ViT-H/14 of PickScore v1",
    "aesthetic": "LAION aesthetic v2 on CLIP ViT-L/14",
    "imagereward": "ImageReward v1.0",
    "geneval": "Mask2Former Swin-S, colours by CLIP ViT-L/14",
    "dpg-bench": "questions answered by BLIP",
}
SCALES = {"geneval": 1.0, "dpg-bench": 100.0}


def describe_metrics(metrics: tuple[str, ...], addresses: Mapping[str, str]) -> dict[str, MetricFacts]:
    """Figure -> {"model", "weights", "scale", "prefix"}, of the metrics that have weights; None where it has none.

    addresses: the config's `weights`. A folder or file is called by its own name, as its place means nothing elsewhere.
    """
    found: dict[str, MetricFacts] = {}
    for name in metrics:
        if not OF.get(name):  # one of the lab's
            continue
        weights = ", ".join(_name_weights(each, addresses) for each in OF[name])
        if name == "lpips":
            found[FIGURE] = {"model": f"LPIPS v0.1 on VGG-16 at {SIDE} pixels", "weights": weights, "scale": None}
        elif name in KINDS or name in PREFIXED:
            of, prefix = PREFIXED.get(name, (name, "none"))
            kind = KINDS[of]
            model = f"open_clip {kind.architecture}, images {kind.shape.__name__}"
            found[name] = {"model": model, "weights": weights, "scale": SCALE, "prefix": prefix}
        else:
            found[name] = {"model": MODELS[name], "weights": weights, "scale": SCALES.get(name)}
    return found


def _name_weights(weights: str, addresses: Mapping[str, str]) -> str:
    try:
        where = address_of(weights, addresses)
    except InputMissing:
        return f"{weights} (not set)"
    return where if hub.is_hub(where) else f"{weights} {Path(where).name}"
