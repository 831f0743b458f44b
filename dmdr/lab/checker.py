"""The exact checker: does this image show what its caption asks for? It judges only; nothing is ever trained on it.

1. A pixel gets the nearest colour of the palette. 2. Connected pixels of one colour are an object. 3. An object is
the shape whose own mask, drawn at the object's place and area, overlaps it best (intersection over union).
4. GenEval's rules decide over the objects, most certain first. `soft` grades what `strict` only passes or fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dmdr.config.prompt_record import Metadata
from dmdr.lab.world import BACKGROUND, COLORS, SHAPES, SIZE, compute_coverage, relative_position

LEAST_AREA = 14  # pixels: half of the smallest shape; less is a speckle
LEAST_OVERLAP = 0.72  # intersection over union with the drawn shape; below, an object of no known shape
AREA = {"circle": np.pi, "square": 4 * 0.886**2, "triangle": 2.2 * 1.35, "cross": 4 * (2 * 1.2 * 0.42 - 0.42**2)}
PALETTE = np.array([BACKGROUND, *COLORS.values()], dtype=np.float64)


@dataclass(frozen=True)
class Seen:
    """A detected object; box is (x0, y0, x1, y1) in pixels, shape is None when no shape fits."""

    shape: str | None
    color: str
    box: tuple[float, float, float, float]
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """strict: GenEval's pass or fail. soft: in [0, 1], see `soft_score`. reason: GenEval's, empty when correct."""

    strict: bool
    soft: float
    reason: str
    seen: tuple[Seen, ...]


def detect(image: np.ndarray) -> tuple[Seen, ...]:
    """Objects of an image (SIZE, SIZE, 3) uint8, most certain first."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"the checker judges ({SIZE}, {SIZE}, 3) uint8 images; got {image.shape} {image.dtype}")
    labels = ((image[:, :, None, :].astype(np.float64) - PALETTE) ** 2).sum(-1).argmin(-1)
    found = []
    for index, color in enumerate(COLORS, start=1):
        parts, _ = ndimage.label(labels == index)
        for number, window in enumerate(ndimage.find_objects(parts), start=1):
            mask = parts == number
            if mask.sum() >= LEAST_AREA:
                rows, columns = window
                box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
                shape, fit = best_shape(mask)
                found.append(Seen(shape, color, box, fit))
    return tuple(sorted(found, key=lambda seen: -seen.overlap))


def best_shape(mask: np.ndarray) -> tuple[str | None, float]:
    """(shape, overlap) of the best fitting shape; drawn at the mask's centroid and area."""
    y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(mask))
    overlaps = {}
    for shape in SHAPES:
        drawn = compute_coverage(shape, x, y, (mask.sum() / AREA[shape]) ** 0.5) >= 0.5
        overlaps[shape] = float((drawn & mask).sum() / (drawn | mask).sum())
    shape = max(overlaps, key=overlaps.__getitem__)
    return (shape if overlaps[shape] >= LEAST_OVERLAP else None), overlaps[shape]


def strict_reason(metadata: Metadata, seen: tuple[Seen, ...]) -> str:
    """GenEval's verdict over detected objects: empty when correct, else the first reason (evaluate_images.py)."""
    groups: list[list[Seen] | None] = []
    for need in metadata["include"]:
        name, count = need["class"], need["count"]
        of_class = [each for each in seen if each.shape == name][:count]
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
        count = sum(each.shape == need["class"] for each in seen)
        if count >= need["count"]:
            return f"expected {need['class']}<{need['count']}, found {count}"
    return ""


def soft_score(metadata: Metadata, seen: tuple[Seen, ...]) -> float:
    """Partial credit in [0, 1]: the share of asked attributes (class, colour, relation) that each required object has
    under greedy matching, summed and divided by the larger of the numbers of required and of detected objects."""
    left, total, required = list(seen), 0.0, 0
    partner: dict[int, Seen] = {}  # place of a need -> the object that was matched to it last
    for index, need in enumerate(metadata["include"]):
        for _ in range(need["count"]):
            required += 1
            best, match = 0.0, None
            for each in left:
                marks = [each.shape == need["class"]]
                if "color" in need:
                    marks.append(each.color == need["color"])
                if "position" in need:
                    relation, target = need["position"]
                    other = partner.get(target)
                    marks.append(other is not None and relation in relative_position(each.box, other.box))
                if sum(marks) / len(marks) > best:
                    best, match = sum(marks) / len(marks), each
            if match is not None:
                left.remove(match)
                partner[index] = match
                total += best
    return total / max(required, len(seen))


def check(metadata: Metadata, image: np.ndarray) -> Verdict:
    """Judge one image (SIZE, SIZE, 3) uint8 against GenEval metadata."""
    seen = detect(image)
    reason = strict_reason(metadata, seen)
    return Verdict(not reason, soft_score(metadata, seen), reason, seen)
