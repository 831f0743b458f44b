"""The sentences that lead a report: how good the first model is, how fast, and what its training cost.

They compare it with the teacher, or with the first other model where the teacher was not evaluated. A fact that was not
measured has no sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.metrics.scorecard import Figures, ModelOnCard, Speed
from stages.reports.sentences import Phrase, Sentence, join_names, join_phrases
from stages.reports.stage_times import StageTime, total_effort
from stages.reports.verdict import (
    Outcome,
    Verdict,
    describe_first,
    describe_model,
    describe_reference,
    judge_pair,
    list_verdicts,
)


@dataclass(frozen=True)
class Headline:
    """What stands on top of a page. also: metrics that were trained on, in short."""

    outcome: Outcome
    sentences: tuple[Sentence, ...]
    also: str


def find_reference(card: Figures) -> str | None:
    """The model that the headline compares with; None where nothing is compared."""
    others = list(dict.fromkeys(pair.b for pair in card.paired))
    return "teacher" if "teacher" in others else next(iter(others), None)


def build_headline(card: Figures, speed: Speed, training: list[StageTime]) -> Headline:
    """The whole headline. training: the stages that the first model went through."""
    reference = find_reference(card)
    if reference is None:
        alone = f"{describe_first(card.models[0])} is compared with no other model here."
        return Headline("undecided", ((Phrase(alone),), *_say_cost(training, 0.0)), "")
    verdict = judge_pair(card, reference)
    saved = _count_saved_seconds(card, reference, speed, training)
    sentences = (*verdict.sentences, _say_speed(card, reference, speed), *_say_cost(training, saved))
    return Headline(verdict.outcome, sentences, verdict.also)


def list_other_verdicts(card: Figures) -> list[Verdict]:
    """The comparisons that the headline is not about."""
    reference = find_reference(card)
    return [verdict for verdict in list_verdicts(card) if verdict.versus != reference]


def list_plain_sentences(card: Figures) -> list[str]:
    """What a scorecard alone tells, as text: quality, network evaluations, then the other verdicts."""
    reference = find_reference(card)
    if reference is None:
        return []
    others = [verdict.text for verdict in list_other_verdicts(card)]
    return [judge_pair(card, reference).text, join_phrases(_say_evaluations(card, reference, ".")), *others]


def _count_saved_seconds(card: Figures, reference: str, speed: Speed, training: list[StageTime]) -> float:
    """Seconds an image that the first model saves; 0 where it was timed on another kind of device than trained on."""
    ours, theirs = (speed.seconds_per_image.get(name) for name in (card.models[0].name, reference))
    drawn_on_cpu = speed.device == "cpu" or speed.device.endswith("a CPU")
    if ours is None or theirs is None or any((each.device == "cpu") != drawn_on_cpu for each in training):
        return 0.0
    return theirs - ours


def _say_evaluations(card: Figures, reference: str, end: str) -> Sentence:
    """How many forwards of the network an image takes."""
    models = {model.name: model for model in card.models}
    ours, theirs = card.models[0], models[reference]
    needs = f"{_capitalize(describe_model(ours.name))} needs {_count(ours)} for an image"
    if ours.nfe == theirs.nfe:
        return (Phrase(f"{needs}, as many as {describe_reference(card, reference)}{end}"),)
    fewer = ours.nfe < theirs.nfe
    ratio = _format_ratio(max(ours.nfe, theirs.nfe) / min(ours.nfe, theirs.nfe))
    return (
        Phrase(f"{needs} instead of {theirs.nfe}, "),
        Phrase(f"{ratio} times {'fewer' if fewer else 'more'}", "better" if fewer else "worse"),
        Phrase(end),
    )


def _capitalize(name: str) -> str:
    """The name of a model as a subject; names of runs and of third parties' models stay as they are."""
    return f"T{name[1:]}" if name.startswith("the ") else name


def _count(model: ModelOnCard) -> str:
    return f"{model.nfe} evaluation{'' if model.nfe == 1 else 's'} of the network"


def _say_speed(card: Figures, reference: str, speed: Speed) -> Sentence:
    """Evaluations of the network, and seconds where both models were timed."""
    ours, theirs = (speed.seconds_per_image.get(name) for name in (card.models[0].name, reference))
    if not ours or not theirs:
        return _say_evaluations(card, reference, ".")
    faster = ours < theirs
    times = f"{_format_ratio(theirs / ours if faster else ours / theirs)} times as {'fast' if faster else 'slow'}"
    return (
        *_say_evaluations(card, reference, ", and "),
        Phrase(f"{ours:.3g} s", measured=True),
        Phrase(" instead of "),
        Phrase(f"{theirs:.3g} s", measured=True),
        Phrase(f" on {speed.device}, "),
        Phrase(times, "better" if faster else "worse", measured=True),
        Phrase("."),
    )


def _format_ratio(ratio: float) -> str:
    """Two digits at most after the point: 12.5, 1.18, 120."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _say_cost(training: list[StageTime], saved: float) -> list[Sentence]:
    """What training took, and after how many images it has paid for itself. saved: seconds an image.

    Nothing where no training stage is known.
    """
    effort = total_effort(training)
    if effort is None:
        return []
    stages, spent = join_names(each.label for each in training), sum(each.processes * each.seconds for each in training)
    paid_back = f", won back after {spent / saved:,.0f} images." if saved > 0 else "."
    return [
        (
            Phrase("Its training took "),
            Phrase(effort, measured=True),
            Phrase(f" ({stages})"),
            Phrase(paid_back, measured=True),
        )
    ]
