"""How well the fake score followed the student after its updates alone: in the record, the report and on the terminal.

Each row of the warm-up has two losses on the same fresh samples of the student: the fake score's, before it trained on
them, and the bare teacher's, from which it began. The distance of the two is what it has learned of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

SETTLED = 0.05  # of the distance to the teacher: the share that the last quarter may add to it


class WarmupFacts(BaseModel):
    """What the record says of the warm-up. Losses are means over a quarter of its updates.

    updates: of the fake score alone. loss_fake, loss_teacher: over the last quarter. earlier_fake, earlier_teacher:
    over the quarter before.
    """

    model_config = ConfigDict(frozen=True)

    updates: int
    loss_fake: float
    loss_teacher: float
    earlier_fake: float
    earlier_teacher: float

    @property
    def gain(self) -> float:
        """By which share of the teacher's loss the fake score's is lower."""
        return 1 - self.loss_fake / self.loss_teacher

    @property
    def still_gains(self) -> float:
        """What the last quarter added to `gain`."""
        return self.gain - (1 - self.earlier_fake / self.earlier_teacher)


def summarize_warmup(rows: Sequence[Mapping[str, float]]) -> WarmupFacts:
    """The facts of a stage with a warm-up. rows: of its metrics; those of the warm-up have numbers below 0."""
    own = [row for row in rows if row["update"] < 0]
    quarter = max(1, len(own) // 4)
    last, earlier = own[-quarter:], own[-2 * quarter : -quarter] or own[:quarter]
    return WarmupFacts(
        updates=len(own),
        loss_fake=fmean(row["loss_fake"] for row in last),
        loss_teacher=fmean(row["loss_teacher"] for row in last),
        earlier_fake=fmean(row["loss_fake"] for row in earlier),
        earlier_teacher=fmean(row["loss_teacher"] for row in earlier),
    )


def describe_warmup(facts: WarmupFacts) -> str:
    """One line: how well the fake score follows, and what to do if it does not yet."""
    count = "1 update" if facts.updates == 1 else f"{facts.updates:,} updates"
    losses = (
        f"after {count} alone, the fake score's loss on fresh samples of the student is {facts.loss_fake:.4g}, the "
        f"teacher's on the same {facts.loss_teacher:.4g}: {facts.gain:.0%} lower"
    )
    if facts.gain <= 0:
        return f"{losses}; it does not follow the student: raise joint.fake_warmup or joint.fake_score.learning_rate"
    if facts.still_gains > SETTLED * facts.gain:
        return f"{losses}; the last quarter alone gained {facts.still_gains:.1%}: a higher joint.fake_warmup may help"
    return f"{losses}; it follows the student, the last quarter changed little"
