"""What a training stage and the evaluation need of prompts, however they are encoded."""

from __future__ import annotations

from typing import Protocol

from dmdr.backbones.protocol import Item
from dmdr.config.prompt_record import PromptRecord


class Prompts(Protocol):
    """Prompts with their conditioning; a PromptSet is one."""

    def __len__(self) -> int: ...

    def items(self, indices: list[int]) -> list[Item]:
        """The items at `indices`, in this order."""

    def records(self, indices: list[int]) -> list[PromptRecord]:
        """The records at `indices`, in this order."""
