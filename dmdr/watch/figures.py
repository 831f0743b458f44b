"""The figures of a look: what images show, and what the updates since the last look logged.

A figure is a column of a metrics row. One that cannot be measured, such as the reward of an image that is not a number,
is left out.

P prompts, S images of each, B images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

import torch

from dmdr import distributed
from dmdr.config.prompt_record import PromptRecord
from dmdr.metrics.faults import Fault, find_fault
from dmdr.rewards.protocol import Reward
from dmdr.state import Row

REWARD, DIVERSITY = "watch/reward", "watch/diversity"
SATURATION, SHARPNESS = "watch/saturation", "watch/sharpness"
NON_FINITE, BLACK, WHITE, FLAT = "watch/non_finite", "watch/black", "watch/white", "watch/one_colour"
SHOWN_BY: dict[str, Fault] = {BLACK: "black", WHITE: "white", FLAT: "one colour"}
OF_IMAGES = (REWARD, DIVERSITY, SATURATION, SHARPNESS, NON_FINITE, *SHOWN_BY)

FAKE_LAG, FAKE_RISE, GRADIENT = "watch/fake_lag", "watch/fake_rise", "watch/gradient"
FIGURES = (*OF_IMAGES, FAKE_LAG, FAKE_RISE, GRADIENT)
TEACHER_LOSS = "watch/loss_teacher"  # of the update before a look: the bare teacher's loss where `loss_fake` is
TEACHER = "watch/teacher_"  # begins the names of the figures of the teacher's own images
NO_CONTRAST = 1e-6  # deviation of pixels below which an image has no edges


def measure_prompt(images_S: torch.Tensor, scores_S: torch.Tensor | None) -> Row:
    """The figures of one prompt; an image that is not finite, or whose score is not, counts for nothing else.

    scores_S: None where no reward is watched.
    """
    sound = images_S.isfinite().flatten(1).all(dim=1)
    if scores_S is not None:
        sound = sound & scores_S.isfinite()
    row = {NON_FINITE: float((~sound).double().mean())}
    if not sound.any():
        return row
    whole_S = images_S[sound]
    if scores_S is not None:
        row[REWARD] = float(scores_S[sound].double().mean())
    row[SATURATION] = float(saturation(whole_S).mean())
    row[SHARPNESS] = float(sharpness(whole_S).mean())
    faults = list_faults(whole_S)
    row |= {figure: faults.count(fault) / len(images_S) for figure, fault in SHOWN_BY.items()}
    if len(whole_S) > 1:
        row[DIVERSITY] = float(diversity(whole_S))
    return row


def average_rows(rows: Sequence[Row]) -> Row:
    """The mean of each figure over the prompts that have it."""
    present = {name: [row[name] for row in rows if name in row] for name in OF_IMAGES}
    return {name: math.fsum(values) / len(values) for name, values in present.items() if values}


def gather_rows(rows: list[Row]) -> list[Row]:
    """The rows of all ranks, rank after rank."""
    if distributed.ranks() == 1:
        return rows
    table = [[row.get(name, math.nan) for name in OF_IMAGES] for row in rows]
    gathered = distributed.all_gather(torch.tensor(table, dtype=torch.float64)).tolist()
    return [
        {name: value for name, value in zip(OF_IMAGES, row, strict=True) if not math.isnan(value)} for row in gathered
    ]


def score_images(reward: Reward, images: torch.Tensor, records: list[PromptRecord]) -> torch.Tensor:
    """The reward (B,) of images (B, 3, H, W); NaN where an image has a value that is not finite."""
    sound = images.isfinite().flatten(1).all(dim=1)
    scores = torch.full((len(images),), math.nan, device=images.device)
    if sound.any():
        known = [record for record, is_sound in zip(records, sound.tolist(), strict=True) if is_sound]
        scores[sound] = reward(images[sound], [record["prompt"] for record in known], known).float()
    return scores


def saturation(images: torch.Tensor) -> torch.Tensor:
    """mean over pixels of max(R, G, B) - min(R, G, B): (B, 3, H, W) in [0, 1] -> (B,) in [0, 1], float64."""
    return (images.amax(1) - images.amin(1)).double().mean(dim=(1, 2))


def diversity(images_S: torch.Tensor) -> torch.Tensor:
    """mean over pairs of sqrt(mean (a - b)^2): (S, 3, H, W) in [0, 1], S > 1 -> scalar in [0, 1], float64."""
    flat = images_S.flatten(1).double()
    return torch.pdist(flat).mean() / math.sqrt(flat.shape[1])


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """mean |difference of neighbouring pixels| / deviation of the pixels: (B, 3, H, W) -> (B,), float64.

    Blur lowers it, less contrast does not. 0 where an image has no contrast.
    """
    pixels = images.double()
    across, down = pixels.diff(dim=3).abs().mean(dim=(1, 2, 3)), pixels.diff(dim=2).abs().mean(dim=(1, 2, 3))
    deviation = pixels.std(dim=(2, 3), correction=0).mean(dim=1)
    return torch.where(deviation > NO_CONTRAST, (across + down) / deviation.clamp(min=NO_CONTRAST), 0.0)


def list_faults(images: torch.Tensor) -> list[Fault]:
    """What images (B, 3, H, W) in [0, 1] that are finite show, where they show nothing."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [fault for image in pixels if (fault := find_fault(image, is_finite=True)) is not None]


def measure_updates(rows: Sequence[Row], every: int) -> Row:
    """The figures of the student updates since the last look, the newest `every` of `rows` at most.

    fake_lag: the fake score's loss beside the bare teacher's on the same samples of the student, which a fake score
    that follows does not exceed. fake_rise: its mean beside that of the first update. gradient: the median of the
    student's.
    """
    of_student = [row for row in rows if row["update"] >= 0]
    done = of_student[-every:]
    losses = [row["loss_fake"] for row in done if "loss_fake" in row]
    gradients = [row["grad_student"] for row in done if "grad_student" in row]
    found: Row = {}
    if losses and of_student[0].get("loss_fake"):
        found[FAKE_RISE] = fmean(losses) / of_student[0]["loss_fake"]
    if gradients:
        found[GRADIENT] = median(gradients)
    if done and done[-1].get(TEACHER_LOSS):
        found[FAKE_LAG] = done[-1]["loss_fake"] / done[-1][TEACHER_LOSS]
    return found


def select_looks(rows: Sequence[Row]) -> list[Row]:
    """The metrics rows that hold a look."""
    return [row for row in rows if NON_FINITE in row]


def name_of_teacher(figure: str) -> str:
    """The name of a figure of the teacher's images."""
    return figure.replace("watch/", TEACHER)
