"""What a scorecard says, in plain sentences: the student against each other model, held-out metrics first."""

from __future__ import annotations

from dmdr.config.stages import MODELS

NOT_A_NUMBER = "not a number"


def format_number(value: float | None, sign: str = "") -> str:
    """A figure as it is printed everywhere: three decimals; `sign` is "+" for differences."""
    return NOT_A_NUMBER if value is None else f"{value:{sign}.3f}"


def outcome_word(low: float | None, high: float | None) -> str:
    """What a 95 % interval of a difference allows to say."""
    if low is None or high is None:
        return "undecided"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def deciding_metric(scorecard: dict) -> str:
    """The metric a verdict is about: the first that was not trained on, else the first. Diversity never decides."""
    held_out = [
        each["name"] for each in scorecard["metrics"] if not each["trained_on"] and not is_diversity(each["name"])
    ]
    return held_out[0] if held_out else scorecard["metrics"][0]["name"]


def is_diversity(metric: str) -> bool:
    """Whether a figure tells how much a prompt's images differ, which is no merit by itself."""
    return metric.startswith("diversity/")


def describe_model(model: str) -> str:
    """A model in a sentence: "the student", but a third party's by its own name."""
    return f"the {model}" if model in MODELS else model


def list_verdicts(scorecard: dict) -> list[dict[str, str]]:
    """One {versus, word, text, also} a comparison: text is the sentence, also the other metrics in short."""
    metric = deciding_metric(scorecard)
    means = {each["model"]: each["mean"] for each in scorecard["metrics"] if each["name"] == metric}
    trained_on = {each["name"] for each in scorecard["metrics"] if each["trained_on"]}
    nfe = {model["name"]: model["nfe"] for model in scorecard["models"]}
    student = scorecard["models"][0]
    known = student["name"] in MODELS
    first = f"The {student['steps']}-step {student['name']}" if known else student["name"]
    found = []
    for pair in scorecard["paired"]:
        if pair["metric"] != metric:
            continue
        outcome = outcome_word(pair["low"], pair["high"])
        reason = (
            "an image or a score is not a number"
            if pair["difference"] is None
            else f"95 % interval of the difference {format_number(pair['low'])} to {format_number(pair['high'])}"
        )
        text = (
            f"{first} scores {format_number(means[pair['a']])} {metric}"
            f"{' (trained on)' if metric in trained_on else ''}, "
            f"{describe_model(pair['b'])} {format_number(means[pair['b']])} at {nfe[pair['b']]} NFE: "
            f"{outcome}, {reason}."
        )
        others = [each for each in scorecard["paired"] if each["b"] == pair["b"] and each["metric"] != metric]
        also = "; ".join(
            f"{each['metric']}{' (trained on)' if each['metric'] in trained_on else ''} "
            f"{format_number(each['difference'], '+')}, {outcome_word(each['low'], each['high'])}"
            for each in others
        )
        found.append({"versus": pair["b"], "word": outcome, "text": text, "also": also})
    return found
