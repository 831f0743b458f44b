"""What a scorecard shows, in plain sentences: the first model against each other one, held-out metrics first."""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.config.stages import MODELS
from dmdr.metrics.scorecard import Figures, ModelOnCard, PairedDifference

NOT_A_NUMBER = "not a number"


@dataclass(frozen=True)
class Verdict:
    """One comparison. versus: the other model; word: the outcome; text: the sentence; also: the other metrics in short.

    `text` holds ": {word}, " once.
    """

    versus: str
    word: str
    text: str
    also: str


def format_number(value: float | None, sign: str = "") -> str:
    """A number as it is printed everywhere: three decimals; `sign` is "+" for differences."""
    return NOT_A_NUMBER if value is None else f"{value:{sign}.3f}"


def outcome_word(low: float | None, high: float | None) -> str:
    """What the 95 % interval of a difference allows one to say."""
    if low is None or high is None:
        return "undecided"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def deciding_metric(card: Figures) -> str:
    """The metric that verdicts are about: the first that was not trained on, else the first.

    Diversity never decides.
    """
    held_out = [row.name for row in card.metrics if not row.trained_on and not is_diversity(row.name)]
    return held_out[0] if held_out else card.metrics[0].name


def is_diversity(metric: str) -> bool:
    """Whether a figure measures how much a prompt's images differ, which is no merit by itself."""
    return metric.startswith("diversity/")


def describe_model(model: str) -> str:
    """A model in a sentence: "the student", but a third party's by its own name."""
    return f"the {model}" if model in MODELS else model


def list_verdicts(card: Figures) -> list[Verdict]:
    """One verdict for each model that the first one is compared with."""
    metric = deciding_metric(card)
    return [_judge_pair(card, pair) for pair in card.paired if pair.metric == metric]


def _judge_pair(card: Figures, pair: PairedDifference) -> Verdict:
    means = {row.model: row.mean for row in card.metrics if row.name == pair.metric}
    trained_on = {row.name for row in card.metrics if row.trained_on}
    nfe = {model.name: model.nfe for model in card.models}
    word = outcome_word(pair.low, pair.high)
    reason = (
        "an image or a score is not a number"
        if pair.difference is None
        else f"95 % interval of the difference {format_number(pair.low)} to {format_number(pair.high)}"
    )
    text = (
        f"{_name_first(card.models[0])} scores {format_number(means[pair.a])} {_mark(pair.metric, trained_on)}, "
        f"{describe_model(pair.b)} {format_number(means[pair.b])} at {nfe[pair.b]} NFE: {word}, {reason}."
    )
    others = [other for other in card.paired if other.b == pair.b and other.metric != pair.metric]
    also = "; ".join(
        f"{_mark(other.metric, trained_on)} {format_number(other.difference, '+')}, "
        f"{outcome_word(other.low, other.high)}"
        for other in others
    )
    return Verdict(pair.b, word, text, also)


def _name_first(model: ModelOnCard) -> str:
    """The subject of the sentence: "The 4-step student", but a third party's model by its own name."""
    return f"The {model.steps}-step {model.name}" if model.name in MODELS else model.name


def _mark(metric: str, trained_on: set[str]) -> str:
    return f"{metric} (trained on)" if metric in trained_on else metric
