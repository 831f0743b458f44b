"""Which learning rates a training stage bears: a grid of short runs, and the rule that recommends one. No torch.

The rule, which has no weights:
1. A cell is unstable if it ended early, if it draws an image that is not a number, if the loss of its fake score on
   fresh images of its student is above WORST times the teacher's, or if saturation or contrast are further from those
   of the teacher's images than DRIFT and than they were at the start.
2. The stable cell with the highest held-out reward leads. It is recommended if its lead over the config's own cell is
   beyond noise, or if the config's own cell is unstable. Otherwise the config's own cell is recommended.
3. A lead is beyond noise if its 95 % interval over the prompts, made wider for the number of cells that might have led
   by chance (Bonferroni), is above zero, and if it is larger than the difference between two runs of the config's own
   cell that differ in their seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from pydantic import BaseModel, ConfigDict

from dmdr.config.run import Config
from dmdr.config.training import Training

DRIFT = 0.3  # share of the teacher's saturation or contrast
WORST = 1.05  # a fake score that learns has a loss below the teacher's; one that hardly moves has the same
STEPS = (1 / 3, 1.0, 3.0)  # of both learning rates around the config's own
CONFIDENCE = 0.95


class Cell(BaseModel):
    """One point of the grid. seed: of its noise and of the order of prompts."""

    model_config = ConfigDict(frozen=True)

    student_rate: float
    fake_rate: float
    fake_updates: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"student-{self.student_rate:g}-fake-{self.fake_rate:g}-ratio-{self.fake_updates}-seed-{self.seed}"

    def describe(self) -> str:
        """In words."""
        return f"student {self.student_rate:g}, fake score {self.fake_rate:g}, {self.fake_updates} updates of it"


class Look(BaseModel):
    """What a student draws, on fixed prompts and noise.

    rewards: held-out, of each prompt; None is not a number. saturation, contrast: means over the images, in [0, 1].
    broken: share of the images that are not numbers. loss_fake, loss_teacher: of the fake score, and of the bare
    teacher in its place, on fresh images of the student; None for the teacher's own images.
    """

    model_config = ConfigDict(frozen=True)

    rewards: tuple[float | None, ...]
    saturation: float
    contrast: float
    broken: float
    loss_fake: float | None = None
    loss_teacher: float | None = None

    @property
    def reward(self) -> float:
        """The mean over the prompts whose images are numbers; NaN without any."""
        values = [value for value in self.rewards if value is not None]
        return fmean(values) if values else math.nan

    @property
    def fit(self) -> float:
        """loss_fake / loss_teacher: below 1 the fake score knows the student's images better than the teacher does."""
        if self.loss_fake is None or not self.loss_teacher:
            return math.nan
        return self.loss_fake / self.loss_teacher


class CellResult(BaseModel):
    """A cell that was run. updates: done; ended: why it ended early, or empty. look: at its end; None: it has none."""

    model_config = ConfigDict(frozen=True)

    cell: Cell
    updates: int
    seconds: float
    ended: str = ""
    look: Look | None = None


@dataclass(frozen=True)
class Verdict:
    """What the rule says. unstable: cell -> why. why: of the recommendation, in words. lead, low: of the leader over
    the config's own cell, and the lower end of its interval; None where one of them is unstable."""

    recommended: Cell
    why: str
    unstable: Mapping[Cell, str]
    lead: float | None = None
    low: float | None = None


def read_own_cell(training: Training, seed: int) -> Cell:
    """The cell that a config itself names."""
    return Cell(
        student_rate=training.student.learning_rate,
        fake_rate=training.fake_score.learning_rate,
        fake_updates=training.fake_updates,
        seed=seed,
    )


def list_cells(
    own: Cell,
    *,
    student_rates: Sequence[float] = (),
    fake_rates: Sequence[float] = (),
    ratios: Sequence[int] = (),
) -> list[Cell]:
    """The grid: the config's own cell, the same with another seed, then the others.

    Without any list, both rates at STEPS of the config's own, and half and twice its ratio at its own rates. A list
    replaces the values of its axis, and then all values of the axes are crossed.
    """
    students = student_rates or [_round(own.student_rate * step) for step in STEPS]
    fakes = fake_rates or [_round(own.fake_rate * step) for step in STEPS]
    crossed = [
        Cell(student_rate=student, fake_rate=fake, fake_updates=ratio, seed=own.seed)
        for ratio in ratios or [own.fake_updates]
        for student in students
        for fake in fakes
    ]
    if not (student_rates or fake_rates or ratios):
        others = (max(1, own.fake_updates // 2), 2 * own.fake_updates)
        crossed += [own.model_copy(update={"fake_updates": ratio}) for ratio in others]
    return list(dict.fromkeys([own, own.model_copy(update={"seed": own.seed + 1}), *crossed]))


def _round(rate: float) -> float:
    """A rate as people write it, with two digits."""
    return float(f"{rate:.2g}")


def apply_cell(config: Config, stage: str, cell: Cell) -> Training:
    """The settings of a training stage with the values of a cell. A final learning rate keeps its share."""
    training = config.joint if stage == "joint" else config.training_of("cold_start")
    rates = {"student": cell.student_rate, "fake_score": cell.fake_rate}
    changes: dict[str, object] = {"fake_updates": cell.fake_updates}
    for role, rate in rates.items():
        optimizer = getattr(training, role)
        final = optimizer.final_learning_rate
        scaled = None if final is None else final * rate / optimizer.learning_rate
        changes[role] = optimizer.model_copy(update={"learning_rate": rate, "final_learning_rate": scaled})
    return training.model_copy(update=changes)


def find_instability(result: CellResult, start: Look, teacher: Look) -> str:
    """Why a cell is unstable; empty if it is stable."""
    look = result.look
    if result.ended or look is None:
        return result.ended or "it drew nothing"
    if look.fit > WORST:
        return f"the loss of its fake score on fresh images is {look.fit:.2f} times the teacher's"
    return find_drift(look, start, teacher)


def find_drift(look: Look, start: Look, teacher: Look) -> str:
    """How images left the teacher's: broken, too colourful or pale, too hard or flat; empty if they did not."""
    if look.broken:
        return f"{look.broken:.0%} of its images are not numbers"
    for name in ("saturation", "contrast"):
        now, before, wanted = (getattr(each, name) for each in (look, start, teacher))
        if abs(now - wanted) > max(DRIFT * wanted, abs(before - wanted)):
            return f"{name} is {now:.3f}; of the teacher's images {wanted:.3f}, at the start {before:.3f}"
    return ""


def recommend(results: Sequence[CellResult], start: Look, teacher: Look) -> Verdict:
    """Apply the rule. results: the config's own cell first, then the same with another seed, then the others."""
    own, again, *others = results
    unstable = {each.cell: why for each in results if (why := find_instability(each, start, teacher))}
    stable = [each for each in (own, *others) if each.cell not in unstable]
    if not stable:
        return Verdict(own.cell, "no cell is stable; try lower rates, or more updates of the fake score", unstable)
    leader = max(stable, key=_reward_of)
    if own.cell in unstable:
        why = "the config's own cell is unstable, and this one has the highest held-out reward of the stable ones"
        return Verdict(leader.cell, why, unstable)
    if leader is own:
        return Verdict(own.cell, "no stable cell has a higher held-out reward than the config's own", unstable)
    lead, low = compare_rewards(leader, own, cells=len(stable) - 1)
    noise = abs(_reward_of(own) - _reward_of(again)) if again.look is not None else 0.0
    if low > 0 and lead > noise:
        why = (
            f"its held-out reward is {lead:.4f} above that of the config's own cell, at least {low:.4f}; two seeds of "
            f"that one differ by {noise:.4f}"
        )
        return Verdict(leader.cell, why, unstable, lead, low)
    why = (
        f"no stable cell is better than the config's own beyond noise: the best, {leader.cell.describe()}, leads by "
        f"{lead:.4f}, and that could be {low:.4f}; two seeds of the config's own differ by {noise:.4f}"
    )
    return Verdict(own.cell, why, unstable, lead, low)


def compare_rewards(one: CellResult, other: CellResult, *, cells: int) -> tuple[float, float]:
    """The mean difference of the rewards of the same prompts, and the lower end of its interval for so many cells."""
    assert one.look is not None and other.look is not None, "both are stable"
    pairs = zip(one.look.rewards, other.look.rewards, strict=True)
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    lead = fmean(differences)
    if len(differences) < 2:
        return lead, -math.inf
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(1, cells)))
    return lead, lead - z * stdev(differences) / math.sqrt(len(differences))


def _reward_of(result: CellResult) -> float:
    return -math.inf if result.look is None else result.look.reward


def write_config_lines(stage: str, cell: Cell) -> str:
    """The lines of a config that name a cell, to paste."""
    return (
        f"{stage}:\n  fake_updates: {cell.fake_updates}\n  student: {{learning_rate: {cell.student_rate:.3g}}}\n"
        f"  fake_score: {{learning_rate: {cell.fake_rate:.3g}}}"
    )
