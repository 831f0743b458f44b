"""The words of the world of shapes: colours, shapes, counts, and captions of GenEval's six tasks. No numpy."""

from __future__ import annotations

from dmdr.config.prompt_record import Metadata, Need

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 50),
    "purple": (150, 50, 190),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(need: Need) -> str:
    """The words for one clause, for example "a red circle" or "three circles"."""
    color = need.get("color", "")
    if need["count"] > 1:
        return " ".join(filter(None, (COUNTS[need["count"]], color, PLURALS[need["class"]])))
    words = " ".join(filter(None, (color, need["class"])))
    return f"{article(words)} {words}"


def caption(metadata: Metadata) -> str:
    """The caption of GenEval metadata, without a template."""
    needs = metadata["include"]
    if len(needs) == 1:
        return phrase(needs[0])
    if metadata["tag"] == "position":
        return f"{phrase(needs[1])} {needs[1]['position'][0]} {phrase(needs[0])}"
    return " and ".join(phrase(need) for need in needs)
