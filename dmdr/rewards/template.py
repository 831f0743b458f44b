"""A reward of your own: how sharp an image is. Printed by `dmdr init reward`; change it, and keep what it promises.

Name it in a config, and train on it or report it:

    rewards: {sharpness: {file: my_rewards.py:Sharpness}}
    joint: {rl: {rewards: {sharpness: 1.0}}}
    evaluate: {metrics: [sharpness]}

Try it:  dmdr check-reward my_rewards.py:Sharpness
Host it: dmdr serve-reward my_rewards.py:Sharpness --port 8000     then rewards: {sharpness: {url: http://HOST:8000}}

The sha256 of this file is part of what names a result: a run goes on only with the file that it began with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Sharpness:
    """1 - exp(-20 * mean |difference of neighbours|): 0 for a plain image, towards 1 for one full of edges."""

    differentiable = True  # the gradient of the scores reaches the images; ReFL needs that, GRPO and DPO do not
    version = "1"  # yours, to tell results apart
    range = (0.0, 1.0)  # the lowest and the highest score; None if there are no bounds

    def __init__(self, device: str) -> None:
        """Load what you need, once. device: where the images will lie, such as "cpu" or "cuda"."""

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> torch.Tensor:
        """The scores (B,), higher is better.

        images: (B, 3, H, W) in [0, 1], RGB. prompts: B texts. metadata: B records, each with at least "prompt", and
        with all that the prompt's source says, for example GenEval's "include". Empty where nothing is known.
        An image's score must not depend on the other images of the batch.
        """
        rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
        columns = (images[..., :, 1:] - images[..., :, :-1]).abs().mean(dim=(1, 2, 3))
        return 1 - torch.exp(-20 * (rows + columns) / 2)
