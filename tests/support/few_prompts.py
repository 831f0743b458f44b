"""A few prompts in memory, encoded by a teacher, as training asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from dmdr.backbones.protocol import Backbone, Item
from dmdr.config.prompt_record import PromptRecord


class FewPrompts:
    """What training needs of a prompt set (`dmdr.promptset.prompts.Prompts`)."""

    def __init__(self, backbone: Backbone, texts: Sequence[str]) -> None:
        self.texts, (self.encoded, _) = texts, backbone.encode(list(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def items(self, indices: list[int]) -> list[Item]:
        return [self.encoded[index] for index in indices]

    def records(self, indices: list[int]) -> list[PromptRecord]:
        return [{"prompt": self.texts[index]} for index in indices]
