"""The settings of a LoRA beside its rank: which modules it adapts, how it begins, and its alpha. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator

Preset = Literal["attention", "wide"]
Init = Literal["kaiming", "gaussian"]


def _check_targets(value: object) -> object:
    """Refuse in one line what is neither a preset nor a list of names; a list becomes a tuple."""
    presets = get_args(Preset)
    hint = f"set {', '.join(presets)}, or a list of modules' names such as [to_q, to_v, ff.net.2]"
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(each, str) and each.strip(".") for each in value):
            raise ValueError(f"lora_targets is a list without names; {hint}")
        if len(set(value)) < len(value):
            raise ValueError(f"lora_targets names a module twice: {', '.join(value)}; name it once")
        return tuple(value)
    if value not in presets:
        raise ValueError(f"lora_targets is neither a preset nor a list; {hint}")
    return value


Targets = Annotated[Preset | tuple[str, ...], BeforeValidator(_check_targets)]


@dataclass(frozen=True)
class LoraForm:
    """What a LoRA adapts and how it begins. alpha: its product B A counts alpha / rank times; None: the rank."""

    targets: Preset | tuple[str, ...] = "attention"
    init: Init = "kaiming"
    alpha: float | None = None

    def scale(self, rank: int) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / rank


@dataclass(frozen=True)
class LoraForms:
    """The LoRAs of a run. student: not used by a full student."""

    fake_score: LoraForm = LoraForm()
    student: LoraForm = LoraForm()
