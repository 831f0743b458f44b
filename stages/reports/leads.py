"""The first model against each of the others: the differences prompt by prompt.

templates/scorecard.html.jinja shows them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures, PairedDifference
from stages.reports.table1 import is_trained_on
from stages.reports.verdict import outcome_word


@dataclass(frozen=True)
class Lead:
    """A mean difference with the ends of its 95 % interval, None where one is not a number; word: the outcome.

    prompts: how many it is of, None where the card does not say.
    """

    difference: float | None
    low: float | None
    high: float | None
    word: str
    outcome: str
    prompts: int | None


@dataclass(frozen=True)
class LeadLine:
    """One metric; leads: over each of the others, None where they are not compared in it."""

    metric: str
    trained_on: bool
    leads: tuple[Lead | None, ...]


@dataclass(frozen=True)
class Leads:
    """All differences; others: the models that the first one is compared with."""

    others: tuple[str, ...]
    lines: tuple[LeadLine, ...]


def build_leads(card: Figures) -> Leads | None:
    """Metrics by models; None where nothing is compared."""
    if not card.paired:
        return None
    pairs = {(pair.metric, pair.b): pair for pair in card.paired}
    metrics = dict.fromkeys(pair.metric for pair in card.paired)
    others = dict.fromkeys(pair.b for pair in card.paired)
    labels = {model.name: model.label for model in card.models}
    lines = (
        LeadLine(
            metric,
            is_trained_on(card, metric),
            tuple(_build_lead(pairs.get((metric, other))) for other in others),
        )
        for metric in metrics
    )
    return Leads(tuple(labels[other] for other in others), tuple(lines))


def _build_lead(pair: PairedDifference | None) -> Lead | None:
    if pair is None:
        return None
    word = outcome_word(pair.low, pair.high)
    return Lead(pair.difference, pair.low, pair.high, word, _first_word(word), pair.n)


def _first_word(text: str) -> str:
    return text.split()[0]
