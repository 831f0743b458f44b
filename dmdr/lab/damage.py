"""Drawings that go wrong in one thing: what a reward must not like, beside captions that are wrong in one thing.

Few-step students and RL spoil shapes before they spoil the scene: two run into each other, a colour bleeds, a square
turns round, a speckle is left over. Each is drawn here by the renderer itself; the checker has no part in it.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from dmdr.lab.world import BACKGROUND, COLORS, SHAPES, SIZE, Thing, coverage, scene_for

WAYS = ("morph", "bleed", "fade", "warp", "bridge", "stray")


def damaged(scene: list[Thing], rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: the scene with one damage.

    morph: a shape halfway to another; bleed: a second colour across a shape; fade: half of it gone; warp: all outlines
    bent; bridge: two things joined; stray: a blob that nobody asked for.
    """
    way = str(rng.choice(WAYS if len(scene) > 1 else [each for each in WAYS if each != "bridge"]))
    chosen = int(rng.integers(len(scene)))
    image = np.broadcast_to(np.float64(BACKGROUND), (SIZE, SIZE, 3))
    for number, thing in enumerate(scene):
        hit = number == chosen
        alpha = coverage(thing.shape, thing.x, thing.y, thing.radius)
        color = np.broadcast_to(np.float64(COLORS[thing.color]), (SIZE, SIZE, 3))
        if hit and way == "morph":
            other = str(rng.choice([shape for shape in SHAPES if shape != thing.shape]))
            alpha = mixed(alpha, coverage(other, thing.x, thing.y, thing.radius), rng.uniform(0.35, 0.65))
        if hit and way == "fade":
            alpha = alpha * mixed(ramp(thing, rng), np.ones_like(alpha), rng.uniform(0, 0.5))
        if hit and way == "bleed":
            second = np.float64(COLORS[str(rng.choice([each for each in COLORS if each != thing.color]))])
            color = mixed(color, second, ramp(thing, rng)[..., None])
        image = mixed(image, color, alpha[..., None])
    if way == "bridge":
        other = scene[(chosen + 1) % len(scene)]
        image = mixed(image, np.float64(COLORS[scene[chosen].color]), bridge(scene[chosen], other, rng)[..., None])
    if way == "stray":
        x, y = rng.uniform(3, SIZE - 3, size=2)
        blob = coverage("circle", x, y, rng.uniform(1.5, 3.5)) * rng.uniform(0.5, 1.0)
        image = mixed(image, np.float64(COLORS[str(rng.choice(list(COLORS)))]), blob[..., None])
    if way == "warp":
        image = warped(image, rng)
    return image.round().clip(0, 255).astype(np.uint8)


def mixed(a: np.ndarray, b: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """`a` where share is 0, `b` where it is 1."""
    return (1 - share) * a + share * b


def ramp(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE) from 0 to 1 across a thing, in a random direction."""
    angle, at = rng.uniform(0, 2 * np.pi), np.arange(SIZE) + 0.5
    along = np.cos(angle) * (at[None, :] - thing.x) + np.sin(angle) * (at[:, None] - thing.y)
    return np.clip(along / thing.radius + rng.uniform(0.2, 0.8), 0, 1)


def bridge(a: Thing, b: Thing, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE) coverage of a thick line between two things."""
    half, marks = rng.uniform(1.2, 3.0), np.zeros((SIZE, SIZE))
    for share in np.linspace(0, 1, 12):
        marks = np.maximum(marks, coverage("circle", mixed(a.x, b.x, share), mixed(a.y, b.y, share), half))
    return marks


def warped(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image (SIZE, SIZE, 3) bent by a smooth field of about a pixel."""
    field = ndimage.gaussian_filter(rng.normal(size=(2, SIZE, SIZE)), sigma=(0, 2.5, 2.5))
    field *= rng.uniform(0.7, 1.6) / field.std()
    where, bands = np.indices((SIZE, SIZE)) + field, np.moveaxis(image, -1, 0)
    return np.stack([ndimage.map_coordinates(band, where, order=1, mode="nearest") for band in bands], axis=-1)


def damaged_images(records: list[dict], rng: np.random.Generator) -> torch.Tensor:
    """A damaged render of a new scene for each record: (count, 3, SIZE, SIZE) uint8."""
    images = np.stack([damaged(scene_for(record, rng), rng) for record in records])
    return torch.from_numpy(images).permute(0, 3, 1, 2)
