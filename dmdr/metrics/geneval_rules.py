"""Whether detected objects are what a GenEval prompt asks for, by the rules of its evaluate_images.py (at 16f1681).

1. An object counts from a confidence of 0.3 on, in counting prompts 0.9; of a class the 16 most confident count.
2. Of a class that should be there `count` times, the `count` most confident are looked at: all of their colours have to
   be right, and each has to stand as asked to each object of the clause that it refers to.
3. `exclude` names how many of a class are too many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmdr.promptset import Metadata, Need

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST = 16  # objects of a class
MARGIN = 0.1  # of both objects' sizes, by which they have to be apart
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """box: x1, y1, x2, y2 in pixels; score in [0, 1]; mask: (H, W) of bool, the object's own pixels."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


Found = Mapping[str, Sequence[Detection]]  # class -> its objects, the most confident first
Colours = Callable[[str, Sequence[Detection]], list[str]]  # of objects of a class


def count_detections(detected: Mapping[str, Sequence[Detection]], tag: str) -> dict[str, list[Detection]]:
    """The objects that count; a class without any is left out."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {
        name: sorted((each for each in objects if each.score > least), key=lambda each: -each.score)[:MOST]
        for name, objects in detected.items()
    }
    return {name: objects for name, objects in kept.items() if objects}


def judge_detections(record: Metadata, found: Found, colours: Colours) -> tuple[bool, str]:
    """(correct, reason) of an image. record: GenEval's metadata; found: by `counted`."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # what met each clause; None: it was not met
    for clause in record.get("include", []):
        objects = list(found.get(clause["class"], []))[: clause["count"]]
        wrong = _unmet(clause, objects, groups, colours)
        groups.append(None if wrong else objects)
        reasons += [wrong] if wrong else []
    for clause in record.get("exclude", []):
        there = len(found.get(clause["class"], []))
        if there >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {there}")
    return not reasons, "\n".join(reasons)


def _unmet(clause: Need, objects: list[Detection], groups: list[Sequence[Detection] | None], colours: Colours) -> str:
    """What is wrong with a clause; empty if it is met."""
    name, count = clause["class"], clause["count"]
    if len(objects) < count:
        return f"expected {name}>={count}, found {len(objects)}"
    if "color" in clause:
        seen = colours(name, objects)
        if (right := seen.count(clause["color"])) < count:
            others = ", ".join(f"{seen.count(each)} {each}" for each in COLOURS if each in seen)
            return f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {others}"
    if "position" in clause:
        where, to = clause["position"]
        if groups[to] is None:
            return f"no target for {name} to be {where}"
        for each in objects:
            for target in groups[to]:
                relations = positions(each.box, target.box)
                if where not in relations:
                    return f"expected {name} {where} target, found {' and '.join(sorted(relations))} target"
    return ""


def positions(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a is of box b: along the unit vector between their centres, less a margin, more than half."""
    corners_a, corners_b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
    apart = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):  # a pixel's thousandth
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, so in holds.items() if so}
