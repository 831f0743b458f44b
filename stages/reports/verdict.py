"""What a scorecard shows, in plain sentences: the first model against each other one, by all held-out metrics together.

1. A metric that the student was trained to raise never counts; it is named apart.
2. Every held-out metric whose 95 % interval excludes 0 is named with its figures, losses like wins.
3. "No difference is shown" is said only where no such interval excludes 0.
4. Diversity is no merit by itself and makes no model better, but less of it is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dmdr.config.stages import MODELS
from dmdr.metrics.scorecard import Figures, MetricRow, ModelOnCard, PairedDifference
from stages.reports.numbers import format_count
from stages.reports.sentences import Phrase, Sentence, Tone, join_names, join_phrases

NOT_A_NUMBER = "not a number"
Outcome = Literal["better", "worse", "mixed", "same", "undecided"]

REFERENCE = {  # a model in a sentence
    "student": "the student",
    "cold start": "the student after its cold start",
    "start": "the model that it started from",
    "teacher": "the teacher",
    "naive teacher": "the naive teacher",
}


@dataclass(frozen=True)
class Verdict:
    """One comparison. versus: the other model; sentences: what held-out metrics say.

    also: the metrics that were trained on, in short; empty where there are none.
    """

    versus: str
    outcome: Outcome
    sentences: tuple[Sentence, ...]
    also: str

    @property
    def text(self) -> str:
        """All sentences as plain text."""
        return " ".join(map(join_phrases, self.sentences))


def format_number(value: float | None, sign: str = "") -> str:
    """A number as it is printed everywhere: three decimals; `sign` is "+" for differences."""
    return NOT_A_NUMBER if value is None else f"{value:{sign}.3f}"


def outcome_word(low: float | None, high: float | None) -> str:
    """What the 95 % interval of a difference allows one to say."""
    if low is None or high is None:
        return "undecided"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def deciding_metric(card: Figures) -> str:
    """The metric that picks examples: the first that was not trained on, else the first.

    Diversity is never picked.
    """
    held_out = [row.name for row in card.metrics if not row.trained_on and not is_diversity(row.name)]
    return held_out[0] if held_out else card.metrics[0].name


def is_diversity(metric: str) -> bool:
    """Whether a figure measures how much a prompt's images differ, which is no merit by itself."""
    return metric.startswith("diversity/")


def describe_model(model: str) -> str:
    """A model in a sentence: "the student", but a third party's by its own name."""
    return REFERENCE.get(model, model)


def describe_reference(card: Figures, versus: str) -> str:
    """The model that the first one is compared with: "its teacher" for a student."""
    return "its teacher" if versus == "teacher" and card.models[0].name in MODELS else describe_model(versus)


def describe_first(model: ModelOnCard) -> str:
    """The subject of a sentence: "The 4-step student", but a third party's model by its own name."""
    if model.name == "cold start":
        return f"The {model.steps}-step student after its cold start"
    if model.name == "start":
        return f"The {model.steps}-step model that the student starts from"
    return f"The {model.steps}-step {model.name}" if model.name in MODELS else model.name


def list_verdicts(card: Figures) -> list[Verdict]:
    """One verdict for each model that the first one is compared with."""
    return [judge_pair(card, versus) for versus in dict.fromkeys(pair.b for pair in card.paired)]


def judge_pair(card: Figures, versus: str) -> Verdict:
    """The first model against one other."""
    trained_on = {row.name for row in card.metrics if row.trained_on}
    pairs = [pair for pair in card.paired if pair.b == versus]
    held_out = [pair for pair in pairs if pair.metric not in trained_on]
    findings = _sort_findings(card, [pair for pair in held_out if not is_diversity(pair.metric)])
    sentences = [
        _say_outcome(findings, describe_first(card.models[0]), describe_reference(card, versus)),
        *_say_undecided(findings),
        *_say_less_varied([pair for pair in held_out if is_diversity(pair.metric)], describe_reference(card, versus)),
    ]
    also = "; ".join(
        f"{pair.metric} {format_number(pair.difference, '+')}, {outcome_word(pair.low, pair.high)}"
        for pair in pairs
        if pair.metric in trained_on
    )
    return Verdict(versus, findings.outcome, tuple(sentences), also)


@dataclass(frozen=True)
class Findings:
    """The held-out metrics of a comparison by what their intervals allow one to say, each with its figures as text."""

    wins: tuple[str, ...]
    losses: tuple[str, ...]
    same: tuple[str, ...]
    undecided: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.wins + self.losses + self.same + self.undecided)

    @property
    def outcome(self) -> Outcome:
        if self.wins and self.losses:
            return "mixed"
        return "better" if self.wins else "worse" if self.losses else "same" if self.same else "undecided"


def _sort_findings(card: Figures, pairs: Sequence[PairedDifference]) -> Findings:
    rows = {(row.name, row.model): row for row in card.metrics}

    def select(word: str) -> tuple[str, ...]:
        return tuple(
            _describe_pair(pair, rows[pair.metric, pair.a], rows[pair.metric, pair.b])
            for pair in pairs
            if outcome_word(pair.low, pair.high) == word
        )

    undecided = tuple(pair.metric for pair in pairs if pair.difference is None)
    return Findings(select("better"), select("worse"), select("no difference shown"), undecided)


def _describe_pair(pair: PairedDifference, ours: MetricRow, theirs: MetricRow) -> str:
    """The means of both and their difference; without the means where they are of more prompts than the difference."""
    if pair.n is not None and not pair.n == ours.n == theirs.n:
        return f"{pair.metric} {_format_lead(pair)} on {format_count(pair.n, 'prompt')}"
    return f"{pair.metric} {format_number(ours.mean)} against {format_number(theirs.mean)}, {_format_lead(pair)}"


def _format_lead(pair: PairedDifference) -> str:
    ends = f"{format_number(pair.low, '+')}, {format_number(pair.high, '+')}"
    return f"{format_number(pair.difference, '+')} [{ends}]"


def _say_outcome(findings: Findings, subject: str, other: str) -> Sentence:
    """The sentence that leads."""
    wins, losses, measures = findings.wins, findings.losses, f"of {findings.count} held-out measures"
    if wins and losses:
        return (
            Phrase(f"{subject} is "),
            Phrase(f"better than {other} in {len(wins)}", "better"),
            Phrase(f" {measures} ({'; '.join(wins)}) and "),
            Phrase(f"worse in {len(losses)}", "worse"),
            Phrase(f" ({'; '.join(losses)})."),
        )
    if wins or losses:
        tone: Tone = "better" if wins else "worse"
        named = wins or losses
        scope = "the one held-out measure" if findings.count == 1 else f"{len(named)} {measures}"
        rest = f" and {'worse' if wins else 'better'} in none" if len(named) < findings.count else ""
        return (Phrase(f"{subject} is "), Phrase(f"{tone} than {other}", tone), _end(f" in {scope}{rest}", named))
    if findings.same:
        scope = "the one held-out measure" if findings.count == 1 else f"any {measures}"
        return (_end(f"No difference between {_lower(subject)} and {other} is shown by {scope}", findings.same),)
    if findings.undecided:
        return (
            Phrase(f"{subject} cannot be compared with {other}", "worse"),
            Phrase(": in every held-out measure, an image or a score is not a number."),
        )
    return (Phrase(f"Nothing says whether {_lower(subject)} is better than {other}: no measure here is held out."),)


def _end(text: str, named: Sequence[str]) -> Phrase:
    return Phrase(f"{text}: {'; '.join(named)}.")


def _lower(subject: str) -> str:
    """A subject inside a sentence."""
    return f"the{subject[3:]}" if subject.startswith("The ") else subject


def _say_undecided(findings: Findings) -> list[Sentence]:
    """Nothing where all or none are undecided."""
    if not findings.undecided or len(findings.undecided) == findings.count:
        return []
    return [(Phrase(f"Undecided: {join_names(findings.undecided)}", "worse"), Phrase(", a score is not a number."))]


def _say_less_varied(pairs: Sequence[PairedDifference], other: str) -> list[Sentence]:
    """Nothing where no diversity is significantly less."""
    named = [f"{pair.metric} {_format_lead(pair)}" for pair in pairs if pair.high is not None and pair.high < 0]
    if not named:
        return []
    return [(Phrase("Its images of one prompt are "), Phrase(f"less varied than {other}'s", "worse"), _end("", named))]
