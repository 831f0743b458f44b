"""The world of shapes: coloured shapes on a grey 32x32 canvas.

A `Thing` is one shape, and a scene is a list of things. `metadata` is GenEval's own description of what a caption asks
for (tag, include, exclude), so that GenEval's official summary script can read our results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmdr.config.prompt_record import Metadata
from dmdr.lab.vocabulary import COLORS, SHAPES

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

SIZE = 32  # pixels a side
BACKGROUND = (150, 150, 150)
RADIUS = (3.9, 6.0)  # pixels
GAP = 1.5  # pixels, the least distance between two things: things that touch cannot be counted
TRIES = 20  # to place one thing before the scene starts again
SUBSAMPLES = 4  # antialiasing: 4x4 samples in each pixel


@dataclass(frozen=True)
class Thing:
    """One shape. x, y: its centre, in pixels from the top left corner. radius: in pixels."""

    shape: str
    color: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 5.0


def covers(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Whether a shape covers the points at offsets (dx, dy) from its centre.

    All four shapes have about the area of a circle of this radius.

    Raises:
        ValueError: there is no such shape.
    """
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.886 * radius
    if shape == "triangle":  # apex up; the centroid is the centre
        height = 2.2 * radius
        v = (dy + height * 2 / 3) / height  # 0 at the apex, 1 at the base
        return (v >= 0) & (v <= 1) & (abs(dx) <= v * 1.35 * radius)
    if shape == "cross":
        long, short = 1.2 * radius, 0.42 * radius
        return ((abs(dx) <= long) & (abs(dy) <= short)) | ((abs(dx) <= short) & (abs(dy) <= long))
    raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")


def compute_coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """The antialiased mask of a shape, (SIZE, SIZE) in [0, 1]."""
    samples = (np.arange(SIZE * SUBSAMPLES) + 0.5) / SUBSAMPLES
    mask = covers(shape, samples[None, :] - x, samples[:, None] - y, radius)
    return mask.reshape(SIZE, SUBSAMPLES, SIZE, SUBSAMPLES).mean(axis=(1, 3))


def render(scene: list[Thing]) -> np.ndarray:
    """Draw a scene: (SIZE, SIZE, 3) uint8. Later things cover earlier ones."""
    image = np.broadcast_to(np.array(BACKGROUND, np.float64), (SIZE, SIZE, 3))
    for thing in scene:
        alpha = compute_coverage(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        image = alpha * np.array(COLORS[thing.color], np.float64) + (1 - alpha) * image
    return image.round().astype(np.uint8)


def bounding_box(thing: Thing) -> Box:
    """(x0, y0, x1, y1) in pixels."""
    left, up, down = {
        "circle": (1, 1, 1),
        "square": (0.886,) * 3,
        "triangle": (1.35, 2.2 * 2 / 3, 2.2 / 3),
        "cross": (1.2,) * 3,
    }[thing.shape]
    r = thing.radius
    return thing.x - left * r, thing.y - up * r, thing.x + left * r, thing.y + down * r


def relative_position(box: Box, other: Box) -> set[str]:
    """The relations of `box` to `other` by GenEval's rule. A diagonal neighbour can have two.

    The offset between the centres is moved towards zero by 0.1 of the summed sizes, then divided by its length. A
    component above 0.5 counts as a relation (djghosh13/geneval, evaluate_images.py).
    """
    center = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    center_other = np.array([(other[0] + other[2]) / 2, (other[1] + other[3]) / 2])
    dims = np.array([box[2] - box[0] + other[2] - other[0], box[3] - box[1] + other[3] - other[1]])
    offset = center - center_other
    offset = np.maximum(abs(offset) - 0.1 * dims, 0) * np.sign(offset)
    if not offset.any():
        return set()
    dx, dy = offset / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, is_true in holds.items() if is_true}


def place_things(rng: np.random.Generator, kinds: list[tuple[str, str]], relation: str | None = None) -> list[Thing]:
    """Draw a random scene by rejection. kinds: (shape, color) of each thing.

    The things lie inside the canvas and do not touch. With `relation`, the first thing has this relation to the second
    by GenEval's rule, and no other.
    """
    while True:
        scene: list[Thing] = []
        for shape, color in kinds:
            for _ in range(TRIES):
                x, y = rng.uniform(5, SIZE - 5, size=2)
                thing = Thing(shape, color, x, y, rng.uniform(*RADIUS))
                x0, y0, x1, y1 = bounding_box(thing)
                fits = x0 >= 0.5 and y0 >= 0.5 and x1 <= SIZE - 0.5 and y1 <= SIZE - 0.5
                if fits and not any(are_too_close(thing, other) for other in scene):
                    scene.append(thing)
                    break
        if len(scene) < len(kinds):
            continue
        if relation is None or relative_position(bounding_box(scene[0]), bounding_box(scene[1])) == {relation}:
            return scene


def are_too_close(a: Thing, b: Thing) -> bool:
    """Whether the bounding boxes are closer than GAP."""
    ax0, ay0, ax1, ay1 = bounding_box(a)
    bx0, by0, bx1, by1 = bounding_box(b)
    return ax0 - GAP < bx1 and bx0 - GAP < ax1 and ay0 - GAP < by1 and by0 - GAP < ay1


def sample_scene(metadata: Metadata, rng: np.random.Generator) -> list[Thing]:
    """Draw a random scene that satisfies the metadata. What it leaves open (colour, size, position) is random."""
    kinds, relation = [], None
    for need in metadata["include"]:
        color = need.get("color") or str(rng.choice(list(COLORS)))
        for _ in range(need["count"]):
            kinds.append((need["class"], color))
        relation = need["position"][0] if "position" in need else relation
    if relation is None:
        return place_things(rng, kinds)
    subject_first = [kinds[1], kinds[0]]  # metadata lists the object of the relation first, as GenEval does
    scene = place_things(rng, subject_first, relation)
    return [scene[1], scene[0]]


def render_images(metadata: Sequence[Metadata], rng: np.random.Generator) -> np.ndarray:
    """Draw and render a random scene for each metadata: (B, SIZE, SIZE, 3) uint8."""
    return np.stack([render(sample_scene(each, rng)) for each in metadata])


def jitter(thing: Thing, rng: np.random.Generator, amount: float) -> Thing:
    """Move and scale a thing a little, as in a good but imprecise drawing. amount: pixels, the standard deviation."""
    dx, dy = rng.normal(0, amount, size=2)
    return replace(thing, x=thing.x + dx, y=thing.y + dy, radius=thing.radius * math.exp(rng.normal(0, amount / 10)))
