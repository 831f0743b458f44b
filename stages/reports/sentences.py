"""Sentences of a report, made of phrases that a page may colour or mark as measured; joined, they are plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Phrase:
    """A part of a sentence. tone: good or bad news; measured: it tells a time, which differs from run to run."""

    text: str
    tone: Tone = ""
    measured: bool = False


Sentence = tuple[Phrase, ...]


def join_phrases(sentence: Sequence[Phrase]) -> str:
    """A sentence as plain text."""
    return "".join(phrase.text for phrase in sentence)


def join_names(names: Iterable[str]) -> str:
    """Names in a sentence, such as "a, b and c"."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last
