"""Judge detected objects by GenEval's rules, from its evaluate_images.py (at 16f1681).

1. An object counts if its confidence is above 0.3, in counting prompts above 0.9. Of each class the 16 most confident
   objects count.
2. A clause of `include` asks for `count` objects of a class, so its `count` most confident objects are judged. All of
   them must have the right colour. Each must be in the right position to each object of the clause that is referred to.
3. A clause of `exclude` gives the number of objects of a class that is too many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmdr.config.prompt_record import Metadata, Need

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST = 16  # objects of a class
MARGIN = 0.1  # the share of both objects' sizes by which they must be apart
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """An object. box: x1, y1, x2, y2 in pixels; score: in [0, 1]; mask: (H, W) of bool, the object's own pixels."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


Detections = Mapping[str, Sequence[Detection]]  # class -> its objects
NameColours = Callable[[str, Sequence[Detection]], list[str]]  # a class and objects of it -> the colour of each


def count_detections(detected: Detections, tag: str) -> dict[str, list[Detection]]:
    """Keep the objects that count in a task, the most confident first. Classes without any are left out."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {
        name: sorted((each for each in objects if each.score > least), key=lambda each: -each.score)[:MOST]
        for name, objects in detected.items()
    }
    return {name: objects for name, objects in kept.items() if objects}


def judge_detections(record: Metadata, detections: Detections, name_colours: NameColours) -> str:
    """Say why the image of a prompt is not correct; empty if it is. detections: from `count_detections`."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # the objects that fulfil each clause; None: they do not
    for clause in record.get("include", []):
        objects = list(detections.get(clause["class"], []))[: clause["count"]]
        reason = _judge_clause(clause, objects, groups, name_colours)
        groups.append(None if reason else objects)
        if reason:
            reasons.append(reason)
    for clause in record.get("exclude", []):
        count = len(detections.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return "\n".join(reasons)


def _judge_clause(
    clause: Need, objects: list[Detection], groups: list[list[Detection] | None], name_colours: NameColours
) -> str:
    """Say why the objects do not fulfil a clause; empty if they do. groups: the objects of the clauses before."""
    name, count = clause["class"], clause["count"]
    if len(objects) < count:
        return f"expected {name}>={count}, found {len(objects)}"
    if "color" in clause:
        colours = name_colours(name, objects)
        right = colours.count(clause["color"])
        if right < count:
            others = ", ".join(f"{colours.count(each)} {each}" for each in COLOURS if each in colours)
            return f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {others}"
    if "position" in clause:
        relation, place = clause["position"]
        targets = groups[place]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for each in objects:
            for target in targets:
                relations = find_positions(each.box, target.box)
                if relation not in relations:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(relations))} target"
    return ""


def score_softly(record: Metadata, detections: Detections, name_colours: NameColours) -> float:
    """Partial credit in [0, 1], ours: GenEval has none. detections: from `count_detections`.

    Each object that a clause of `include` asks for gets the share of its attributes (class, colour, position) that a
    detected one has; one that is missing gets 0. The score is the sum, divided by the number of objects that are asked
    for and of those that `exclude` calls too many. It is 1 exactly where `judge_detections` finds no fault.
    """
    credit, count = 0.0, 0
    groups: list[list[Detection]] = []
    for clause in record.get("include", []):
        name, wanted = clause["class"], clause["count"]
        objects = list(detections.get(name, []))[:wanted]
        count += wanted
        marks = [[True] for _ in objects]
        if "color" in clause and objects:
            for mark, colour in zip(marks, name_colours(name, objects), strict=True):
                mark.append(colour == clause["color"])
        if "position" in clause:
            relation, place = clause["position"]
            for mark, each in zip(marks, objects, strict=True):
                is_there = [relation in find_positions(each.box, target.box) for target in groups[place]]
                mark.append(bool(is_there) and all(is_there))
        groups.append(objects)
        credit += sum(sum(mark) / len(mark) for mark in marks)
    for clause in record.get("exclude", []):
        count += max(0, len(detections.get(clause["class"], [])) - clause["count"] + 1)
    return credit / max(count, 1)


def find_positions(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """The positions of box a relative to box b.

    A position holds if the offset between the centres, less a margin, has a share above half in its direction.
    """
    corners_a, corners_b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
    apart = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):  # a thousandth of a pixel
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, is_so in holds.items() if is_so}
