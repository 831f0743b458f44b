"""All prompts of an evaluation in one list that can be searched and filtered; templates/explorer.html.jinja shows it.

Images are small here, so that a page of many prompts can still be passed on. Where there are too many prompts even so,
some have scores only, and the page says how many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures
from stages.reports.gallery import LARGEST
from stages.reports.headline import find_reference
from stages.reports.pictures import Captioned
from stages.reports.table1 import is_trained_on, list_figures
from stages.reports.verdict import NOT_A_NUMBER, deciding_metric, describe_reference

SIDES = ((300, LARGEST), (1000, 160), (2000, 128))  # images on the page -> pixels of their longer side
MOST_IMAGES = SIDES[-1][0]


@dataclass(frozen=True)
class Measure:
    """A figure by which prompts can be filtered. is_first: chosen when the page opens."""

    name: str
    trained_on: bool
    is_first: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation. scores: figure -> model -> score; images: none where they did not fit on the page.

    is_broken: an image of it shows nothing.
    """

    prompt: str
    tag: str | None
    scores: Mapping[str, Mapping[str, float]]
    images: tuple[Captioned, ...]
    is_broken: bool


@dataclass(frozen=True)
class Entry:
    """A prompt of the list. leads: measure by measure, the first model's score less the other's, or empty.

    scores: all of them in words.
    """

    number: int
    prompt: Prompt
    leads: str
    scores: str


@dataclass(frozen=True)
class Explorer:
    """All prompts. first, other: the models of the leads; other is None where nothing is compared."""

    first: str
    other: str | None
    tasks: tuple[str, ...]
    measures: tuple[Measure, ...]
    entries: tuple[Entry, ...]
    with_images: int


def choose_side(images: int) -> int:
    """Pixels of the longer side of each image, where the page has so many."""
    return next((side for most, side in SIDES if images <= most), SIDES[-1][1])


def choose_pictured(prompts: int, models: int) -> set[int]:
    """Places of the prompts whose images fit on the page: all of them, or some spread evenly."""
    room = max(1, MOST_IMAGES // models)
    return set(range(prompts)) if prompts <= room else {n * prompts // room for n in range(room)}


def build_explorer(card: Figures, prompts: Sequence[Prompt]) -> Explorer:
    """The list. prompts: all of them, in their order."""
    first, reference, decides = card.models[0].name, find_reference(card), deciding_metric(card)
    figures = [figure for figure in list_figures(card) if any(figure in each.scores for each in prompts)]
    return Explorer(
        card.models[0].label,
        None if reference is None else describe_reference(card, reference),
        tuple(sorted({each.tag for each in prompts if each.tag})),
        tuple(Measure(figure, is_trained_on(card, figure), figure == decides) for figure in figures),
        tuple(
            Entry(
                number,
                each,
                ";".join(_format_lead(each, figure, first, reference) for figure in figures),
                describe_scores(each, card),
            )
            for number, each in enumerate(prompts, start=1)
        ),
        sum(bool(each.images) for each in prompts),
    )


def describe_scores(prompt: Prompt, card: Figures) -> str:
    """Such as "strict: student 1.00, teacher 0.00; soft: student 1.00, teacher 0.50"."""
    labels = {model.name: model.label for model in card.models}
    by_figure = (
        f"{figure}: {', '.join(f'{labels[model]} {_format_score(score)}' for model, score in by_model.items())}"
        for figure, by_model in prompt.scores.items()
    )
    return "; ".join(by_figure)


def _format_score(score: float) -> str:
    return f"{score:.2f}" if math.isfinite(score) else NOT_A_NUMBER


def _format_lead(prompt: Prompt, figure: str, first: str, reference: str | None) -> str:
    """Empty where the figure does not judge the prompt, or a score is not a number."""
    scores = prompt.scores.get(figure, {})
    lead = math.nan if reference is None else scores.get(first, math.nan) - scores.get(reference, math.nan)
    return f"{lead:.4g}" if math.isfinite(lead) else ""
