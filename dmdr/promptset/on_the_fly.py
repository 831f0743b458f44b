"""Encode prompts when they are asked for, from a PromptSet that holds their texts only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmdr.backbones.protocol import Backbone, Item
from dmdr.config.prompt_record import PromptRecord
from dmdr.promptset.encode import encode_batches
from dmdr.promptset.read import PromptSet


class OnTheFly:
    """Encodes the prompts of each call by themselves, and keeps none of them.

    So an item depends on the prompts of its call and on nothing that happened before: a stage that is resumed gets the
    same numbers as one that is not.

    Args:
        texts: the prompts.
        backbone: the teacher with its text encoders.
        dtype: of the items.
    """

    def __init__(self, texts: PromptSet, backbone: Backbone, dtype: torch.dtype) -> None:
        self.texts, self.backbone, self.dtype = texts, backbone, dtype

    def __len__(self) -> int:
        return len(self.texts)

    def records(self, indices: Sequence[int]) -> list[PromptRecord]:
        return self.texts.records(indices)

    def items(self, indices: Sequence[int]) -> list[Item]:
        own = list(dict.fromkeys(indices))
        prompts = [record["prompt"] for record in self.records(own)]
        encoded = [item for items, _ in encode_batches(self.backbone, prompts, self.dtype) for item in items]
        found = dict(zip(own, encoded, strict=True))
        return [found[index] for index in indices]
