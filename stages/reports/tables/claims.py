"""The paper's claims on a page and as sentences: what was judged, how it came out, and what the paper itself shows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from stages.reports.numbers import format_count
from stages.reports.tables.judgement import FAILS, HOLDS, NOT_RUN, UNDECIDED, Judgement
from stages.reports.verdict import format_number


@dataclass(frozen=True)
class Sentence:
    """One judgement in words, around the word that decides; outcome: better, worse or nothing, for the colour."""

    before: str
    word: str
    after: str
    outcome: str
    trained_on: bool


@dataclass(frozen=True)
class JudgedClaim:
    """What the paper says, and our judgements of it."""

    claim: str
    sentences: tuple[Sentence, ...]


@dataclass(frozen=True)
class Claims:
    """All claims of a table. words: how often each outcome came up, such as "holds 3"."""

    judgements: int
    words: tuple[str, ...]
    claims: tuple[JudgedClaim, ...]


def build_claims(judgements: list[Judgement]) -> Claims:
    """The judgements under what the paper says, in their order."""
    counts = Counter(judgement.word for judgement in judgements)
    words = tuple(f"{word} {counts[word]}" for word in (HOLDS, FAILS, UNDECIDED, NOT_RUN) if counts[word])
    grouped = groupby(judgements, key=lambda judgement: judgement.claim.claim)
    claims = tuple(JudgedClaim(claim, tuple(map(_build_sentence, group))) for claim, group in grouped)
    return Claims(len(judgements), words, claims)


def _build_sentence(judgement: Judgement) -> Sentence:
    before, after = format_judgement(judgement).split(judgement.word, 1)
    outcome = {HOLDS: "better", FAILS: "worse"}.get(judgement.word, "")
    return Sentence(before, judgement.word, after, outcome, judgement.trained_on)


def format_judgement(judgement: Judgement) -> str:
    """One judgement as a plain sentence."""
    at = f" at {judgement.variant.label}" if judgement.variant else ""
    on = "On" if judgement.claim.of == "scores" else "By the mean over training of"
    text = f"{on} {judgement.figure}{at}: {judgement.word}{_describe_means(judgement)}."
    paper = ", ".join(f"{column} {value:+.4f}" for column, value in judgement.paper.items())
    return f"{text} In the paper: {paper}." if paper else text


def _describe_means(judgement: Judgement) -> str:
    """The two means, their difference, and how much it rests on; empty where nothing was run yet."""
    if judgement.difference is None or judgement.means is None:
        return ""
    mean, low, high = judgement.difference
    if math.isinf(low):
        difference = "one seed has no interval"
    elif math.isnan(mean):
        difference = "a score is not a number"
    else:
        interval = f"{format_number(low, '+')} to {format_number(high, '+')}"
        difference = f"difference {format_number(mean, '+')}, 95 % interval {interval}"
    higher, lower = (
        f"{label} {format_number(value)}" for label, value in zip(judgement.labels, judgement.means, strict=True)
    )
    prompts = f" and {format_count(judgement.prompts, 'prompt')}" if judgement.prompts else ""
    return f"; {higher}, {lower}: {difference}, over {format_count(judgement.seeds, 'seed')}{prompts}"
