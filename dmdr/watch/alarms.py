"""What rings: a figure of a look that left its bounds.

1. Neither the paper nor the official demo watches training; all of this is ours.
2. An alarm rings when a breach begins, and again only after the breach has ended in between.
3. All alarms follow from the rows, so a resumed run needs no memory of its own.
4. Joint training begins with a good student, and its first look is what later ones are compared with. A cold start
   begins with what the teacher draws in too few steps: pale and blurred. It is compared with the teacher's own images.
   What it may not lose, it must have had before. A held-out reward may fall to the teacher's on the way, so it does not
   say which of its students is the best: that is the newest healthy one. It may even dip below the teacher's for some
   tens of updates, because structure comes before detail: by 0.076 in the quickstart, whose teacher has 0.95.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dmdr.config.watch import Watch
from dmdr.state import Row
from dmdr.watch.figures import (
    BLACK,
    DIVERSITY,
    FAKE_LAG,
    FAKE_RISE,
    FLAT,
    GRADIENT,
    NON_FINITE,
    REWARD,
    SATURATION,
    SHARPNESS,
    SHOWN_BY,
    WHITE,
    name_of_teacher,
)

DIP = 3.0  # a cold start's held-out reward may fall so many times as far as that of joint training (ours)
# The settings of a stage that an alarm tells to lower, as an alarm's line names them
RL, STUDENT, FAKE = "rl.weight", "student.learning_rate", "fake_score.learning_rate"
ADVICE = {
    SHARPNESS: (RL, STUDENT),
    BLACK: (FAKE, STUDENT),
    WHITE: (FAKE, STUDENT),
    FLAT: (STUDENT, FAKE),
    FAKE_LAG: (FAKE,),
    FAKE_RISE: (STUDENT,),
    GRADIENT: (STUDENT,),
}  # of any other figure: RL, STUDENT


@dataclass(frozen=True)
class Alarm:
    """A figure that went too far: its value `now` at `update`, and what it `was` at update `since`.

    since: None where `was` is the teacher's.
    """

    figure: str
    update: int
    now: float
    since: int | None
    was: float

    def describe(self, watch: Watch) -> str:
        """What is wrong, as a clause."""
        now, was = f"{self.now:.4g}", f"{self.was:.4g}"
        at = f"it was {was} at update {self.since}" if self.since is not None else f"the teacher's is {was}"
        kept = "its EMA is kept" if watch.export == "best" else "export: best of the watch would keep its EMA"
        best = f", its best ({kept})"
        return {
            REWARD: f"the held-out reward {watch.reward} is {now}, {at}{'' if self.since is None else best}",
            DIVERSITY: f"the difference between images of one prompt is {now}, {at}: they become alike",
            SATURATION: f"colour saturation is {now}, {at}: a reward may be hacked by colour",
            SHARPNESS: f"sharpness is {now}, {at}: images become blurred",
            NON_FINITE: f"the share of images that are not numbers is {now}, {at}",
            BLACK: f"the share of black images is {now}, {at}",
            WHITE: f"the share of white images is {now}, {at}",
            FLAT: f"the share of images of one colour is {now}, {at}",
            FAKE_LAG: f"the fake score's loss is {now} times the bare teacher's on the student's samples: it no longer "
            "describes the student",
            FAKE_RISE: f"the fake score's loss is {now} times that of the first update: it does not keep up with the "
            "student",
            GRADIENT: f"the norm of the student's gradient is {now}, {at}: nothing moves it any more",
        }[self.figure]

    def line(self, watch: Watch, stage: str, *, has_rl: bool) -> str:
        """One line: the figure, its value now and before, and what to do."""
        lower = [setting for setting in ADVICE.get(self.figure, (RL, STUDENT)) if has_rl or setting != RL]
        gentler = " or ".join(f"{stage}.{setting}" for setting in lower)
        more = ", or train on more rewards" if self.figure == REWARD and has_rl else ""
        return f"ALARM at update {self.update}: {self.describe(watch)}; lower {gentler}{more}"


def find_alarms(watch: Watch, looks: Sequence[Row]) -> list[Alarm]:
    """All alarms of a stage so far, each at the look where its breach began."""
    alarms: list[Alarm] = []
    ongoing: set[str] = set()
    for breaches in list_breaches(watch, looks):
        alarms += [alarm for alarm in breaches if alarm.figure not in ongoing]
        ongoing = {alarm.figure for alarm in breaches}
    return alarms


@dataclass
class Past:
    """What a look is compared with. start: the first look. top: the best. first, highest: look by figure."""

    start: Row
    top: Row | None = None
    first: dict[str, Row] = field(default_factory=dict)
    highest: dict[str, Row] = field(default_factory=dict)

    def add(self, look: Row) -> None:
        """Count a look in."""
        self.top = best_look([look] if self.top is None else [self.top, look])
        for figure, value in look.items():
            self.first.setdefault(figure, look)
            if figure not in self.highest or value > self.highest[figure][figure]:
                self.highest[figure] = look


def list_breaches(watch: Watch, looks: Sequence[Row]) -> list[list[Alarm]]:
    """The breaches of each look."""
    found: list[list[Alarm]] = []
    past = Past(looks[0]) if looks else None
    for look in looks:
        assert past is not None, "there is a first look"
        found.append(list(find_breaches(watch, look, past)))
        past.add(look)
    return found


def find_breaches(watch: Watch, look: Row, past: Past) -> Iterator[Alarm]:
    """The breaches at a look. past: the looks before it; the first one is compared with itself."""

    def ring(figure: str, was: Bound) -> Alarm:
        return Alarm(figure, int(look["update"]), look[figure], was.since, was.value)

    best = find_best_reward(past)
    drop = watch.reward_drop * (DIP if has_teacher(past.start) else 1)
    if best is not None and REWARD in look and look[REWARD] < best.value - drop:
        yield ring(REWARD, best)
    for figure, drop in {DIVERSITY: watch.diversity_drop, SHARPNESS: watch.sharpness_drop}.items():
        floor = find_floor(figure, past)
        if figure in look and floor is not None and look[figure] < floor.value * (1 - drop):
            yield ring(figure, floor)
    for figure in (SATURATION, *SHOWN_BY):
        ceiling = find_ceiling(figure, past.start)
        if figure in look and ceiling is not None and look[figure] > raise_ceiling(watch, figure, ceiling.value):
            yield ring(figure, ceiling)
    if look[NON_FINITE] > 0:
        yield ring(NON_FINITE, read_bound(past.start, NON_FINITE))
    if look.get(FAKE_LAG, 0.0) > watch.fake_lag:
        yield ring(FAKE_LAG, Bound(1.0, None))
    if look.get(FAKE_RISE, 0.0) > watch.fake_rise:
        yield ring(FAKE_RISE, Bound(1.0, None))
    if GRADIENT in past.first and GRADIENT in look:
        was = read_bound(past.first[GRADIENT], GRADIENT)
        if look[GRADIENT] < was.value * (1 - watch.gradient_drop):
            yield ring(GRADIENT, was)


def has_teacher(start: Row) -> bool:
    """Whether the teacher's images stand beside the first look, as in a cold start."""
    return name_of_teacher(NON_FINITE) in start


@dataclass(frozen=True)
class Bound:
    """A value that a figure had at update `since`; None: that the teacher's images have."""

    value: float
    since: int | None


def read_bound(look: Row, figure: str) -> Bound:
    return Bound(look[figure], int(look["update"]))


def find_best_reward(past: Past) -> Bound | None:
    """The best held-out reward so far, up to the teacher's where its images stand beside the first look."""
    of_teacher = past.start.get(name_of_teacher(REWARD))
    if past.top is None:
        return None
    best = read_bound(past.top, REWARD)
    return Bound(of_teacher, None) if of_teacher is not None and best.value > of_teacher else best


def find_floor(figure: str, past: Past) -> Bound | None:
    """What a figure may not fall far below; None: nothing yet.

    It is the first look's. Where the teacher's images stand beside it, it is the highest so far, up to the teacher's.
    """
    of_teacher = past.start.get(name_of_teacher(figure))
    if of_teacher is None:
        known = past.first and figure in past.start
        return read_bound(past.start, figure) if known else None
    if figure not in past.highest:
        return None
    highest = read_bound(past.highest[figure], figure)
    return Bound(of_teacher, None) if highest.value > of_teacher else highest


def find_ceiling(figure: str, start: Row) -> Bound | None:
    """What a figure may not rise far above: the first look's, or the teacher's where that is higher."""
    own, of_teacher = start.get(figure), start.get(name_of_teacher(figure))
    if of_teacher is not None and (own is None or of_teacher > own):
        return Bound(of_teacher, None)
    return None if own is None else read_bound(start, figure)


def raise_ceiling(watch: Watch, figure: str, value: float) -> float:
    """A share of images may rise by so much, saturation by a share of itself."""
    return value * (1 + watch.saturation_rise) if figure == SATURATION else value + watch.blank_rise


def best_look(looks: Sequence[Row]) -> Row | None:
    """The look with the highest held-out reward, the first of equals. A look with a broken image is never the best."""
    whole = [look for look in looks if look[NON_FINITE] == 0 and REWARD in look]
    return max(whole, key=lambda look: look[REWARD], default=None)


def list_kept(watch: Watch, looks: Sequence[Row]) -> list[int]:
    """The updates whose checkpoints are kept, the best first: of healthy looks, those with the highest held-out reward;
    in a cold start, the newest. A stage that recovers keeps the first healthy one as well."""
    healthy = [look for look, breaches in zip(looks, list_breaches(watch, looks), strict=True) if not breaches]
    by_reward = bool(looks) and not has_teacher(looks[0])
    ranked = sorted(healthy, key=lambda look: (-look[REWARD] if by_reward else -look["update"], look["update"]))
    kept = [*ranked[: watch.kept], *healthy[: int(watch.recovers)]]
    return list(dict.fromkeys(int(look["update"]) for look in kept))
