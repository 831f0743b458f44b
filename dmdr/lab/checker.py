"""The exact checker: it decides whether an image shows what its caption asks for. Nothing is ever trained on it.

1. Each pixel gets the nearest colour of the palette.
2. Connected pixels of one colour are an object.
3. For each shape, a mask is drawn at the object's position with the object's area. The object has the shape whose mask
   overlaps it best (intersection over union).
4. GenEval's rules decide about the objects, most certain first: `strict` is pass or fail, `soft` gives partial credit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dmdr.config.prompt_record import Metadata
from dmdr.lab.vocabulary import COLORS, SHAPES
from dmdr.lab.world import BACKGROUND, SIZE, compute_coverage, relative_position

LEAST_AREA = 14  # pixels: half of the smallest shape; anything smaller is ignored as a speckle
LEAST_OVERLAP = 0.72  # intersection over union with the drawn mask; below it, an object has no known shape
AREA = {"circle": np.pi, "square": 4 * 0.886**2, "triangle": 2.2 * 1.35, "cross": 4 * (2 * 1.2 * 0.42 - 0.42**2)}
PALETTE = np.array([BACKGROUND, *COLORS.values()], dtype=np.float64)


@dataclass(frozen=True)
class DetectedObject:
    """A detected object. box: (x0, y0, x1, y1) in pixels. shape: None if no shape fits."""

    shape: str | None
    color: str
    box: tuple[float, float, float, float]
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """The checker's decision about an image.

    strict: pass or fail by GenEval's rules. soft: in [0, 1], see `soft_score`. reason: why it fails, or empty.
    """

    strict: bool
    soft: float
    reason: str
    objects: tuple[DetectedObject, ...]


def detect_objects(image: np.ndarray) -> tuple[DetectedObject, ...]:
    """The objects in an image (SIZE, SIZE, 3) uint8, most certain first.

    Raises:
        ValueError: the image has another shape or dtype.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the checker needs an image ({SIZE}, {SIZE}, 3) uint8, got {image.shape} {image.dtype}; convert it"
        )
    labels = ((image[:, :, None, :].astype(np.float64) - PALETTE) ** 2).sum(-1).argmin(-1)
    objects = []
    for index, color in enumerate(COLORS, start=1):
        parts, _ = ndimage.label(labels == index)
        for number, window in enumerate(ndimage.find_objects(parts), start=1):
            mask = parts == number
            if mask.sum() >= LEAST_AREA:
                rows, columns = window
                box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
                shape, fit = match_shape(mask)
                objects.append(DetectedObject(shape, color, box, fit))
    return tuple(sorted(objects, key=lambda each: -each.overlap))


def match_shape(mask: np.ndarray) -> tuple[str | None, float]:
    """The shape that fits a mask best, None if none fits, and its overlap. It has the mask's centroid and area."""
    y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(mask))
    overlaps = {}
    for shape in SHAPES:
        template = compute_coverage(shape, x, y, (mask.sum() / AREA[shape]) ** 0.5) >= 0.5
        overlaps[shape] = float((template & mask).sum() / (template | mask).sum())
    shape = max(overlaps, key=overlaps.__getitem__)
    return (shape if overlaps[shape] >= LEAST_OVERLAP else None), overlaps[shape]


def explain_failure(metadata: Metadata, objects: tuple[DetectedObject, ...]) -> str:
    """The first reason why the objects fail GenEval's rules (evaluate_images.py); empty if they pass."""
    groups: list[list[DetectedObject] | None] = []
    for need in metadata["include"]:
        name, count = need["class"], need["count"]
        of_class = [each for each in objects if each.shape == name][:count]
        reason = ""
        if len(of_class) < count:
            reason = f"expected {name}>={count}, found {len(of_class)}"
        elif "color" in need and sum(each.color == need["color"] for each in of_class) < count:
            reason = f"expected {need['color']} {name}>={count}, found {', '.join(e.color for e in of_class)}"
        elif "position" in need:
            relation, target = need["position"]
            others = groups[target]
            if others is None:
                reason = f"no target for {name} to be {relation}"
            elif any(relation not in relative_position(a.box, b.box) for a in of_class for b in others):
                reason = f"expected {name} {relation} target"
        if reason:
            return reason
        groups.append(of_class)
    for need in metadata.get("exclude", ()):
        count = sum(each.shape == need["class"] for each in objects)
        if count >= need["count"]:
            return f"expected {need['class']}<{need['count']}, found {count}"
    return ""


def soft_score(metadata: Metadata, objects: tuple[DetectedObject, ...]) -> float:
    """Partial credit in [0, 1].

    Greedy matching gives each required object a detected one. Its credit is the share of the required attributes
    (class, colour, relation) that the detected object has. The score is the sum of the credits, divided by the number
    of required or of detected objects, whichever is larger.
    """
    unmatched, total, required = list(objects), 0.0, 0
    matches: dict[int, DetectedObject] = {}  # index of a need -> the object that was matched to it last
    for index, need in enumerate(metadata["include"]):
        for _ in range(need["count"]):
            required += 1
            best, match = 0.0, None
            for each in unmatched:
                marks = [each.shape == need["class"]]
                if "color" in need:
                    marks.append(each.color == need["color"])
                if "position" in need:
                    relation, target = need["position"]
                    other = matches.get(target)
                    marks.append(other is not None and relation in relative_position(each.box, other.box))
                if sum(marks) / len(marks) > best:
                    best, match = sum(marks) / len(marks), each
            if match is not None:
                unmatched.remove(match)
                matches[index] = match
                total += best
    return total / max(required, len(objects))


def check(metadata: Metadata, image: np.ndarray) -> Verdict:
    """Judge one image (SIZE, SIZE, 3) uint8 against GenEval metadata."""
    objects = detect_objects(image)
    reason = explain_failure(metadata, objects)
    return Verdict(not reason, soft_score(metadata, objects), reason, objects)
