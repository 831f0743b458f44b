"""The hacking alarm: it draws images with the EMA during joint training and measures them in ways nothing trains on.

1. Neither the paper nor the official demo watches training; all of this is ours.
2. Prompts and noise are the same at every look, so its figures differ by the weights alone. Evaluation prompts stay
   out: they decide later, and to decide twice by the same prompts would flatter the student.
3. A look at update u sees the EMA after u updates and stands in the metrics row of update u. The end of the stage is
   always looked at and gets a row of its own.
4. An alarm rings when a breach begins, and again only after the breach has ended in between.
5. All alarms follow from the rows, so a resumed run needs no memory of its own.

P prompts, S images of each, B images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch

from dmdr import distributed
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.training import Watch
from dmdr.noise import noise_for
from dmdr.promptset import spread_evenly
from dmdr.promptset.prompts import Prompts
from dmdr.rewards.protocol import Reward
from dmdr.shared_base import SharedBase
from dmdr.state import Row, TrainState
from dmdr.update import roll_out

REWARD, DIVERSITY = "watch/reward", "watch/diversity"
SATURATION, NON_FINITE = "watch/saturation", "watch/non_finite"
FIGURES = (
    REWARD,
    DIVERSITY,
    SATURATION,
    NON_FINITE,
)  # columns of a metrics row; one without a finite image is left out


@dataclass(frozen=True)
class Alarm:
    """A figure that went too far: its value `now` at `update`, and the value it had at update `since`."""

    figure: str
    update: int
    now: float
    since: int
    was: float

    def line(self, watch: Watch) -> str:
        """One line: the figure, its value now and before, and what to do."""
        now, gentler = f"{self.now:.4g}", "lower joint.rl.weight or joint.student.learning_rate"
        before = f"it was {self.was:.4g} at update {self.since}"
        kept = "its EMA is kept" if watch.export == "best" else "joint.watch.export: best would keep its EMA"
        message = {
            REWARD: f"the held-out reward {watch.reward} is {now}, {before}, its best ({kept}); {gentler}, or train on "
            "more rewards",
            DIVERSITY: f"the difference between images of one prompt is {now}, {before}: they become alike; {gentler}",
            SATURATION: f"colour saturation is {now}, {before}: a reward may be hacked by colour; {gentler}",
            NON_FINITE: f"the share of images that are not numbers is {now}, {before}; {gentler}",
        }[self.figure]
        return f"ALARM at update {self.update}: {message}"


@dataclass(frozen=True)
class Look:
    """What one look found: figures for the metrics row, empty when no look was due, and whether the stage ends here."""

    figures: Row = field(default_factory=dict)
    ends_stage: bool = False


@dataclass(frozen=True)
class Watcher:
    """Looks at the EMA every `config.every` updates and reports alarms.

    reward: one that is not trained on. prompts: of training; `config.prompts` of them are drawn, evenly spread.
    times: (N + 1,) of the student, on its device. eta: of the finished student. at_once: prompts that are drawn
    together. say: takes an alarm's line.
    """

    config: Watch
    base: SharedBase
    reward: Reward
    prompts: Prompts
    times: torch.Tensor
    eta: float
    seed: int
    at_once: int
    say: Callable[[str], None]

    def look(self, state: TrainState, *, last: bool) -> Look:
        """Measure the EMA if that is due or this is the `last` look; keep it where the config exports the best."""
        if not last and state.update % self.config.every:
            return Look()
        with state.averaged():
            figures = self.measure()
        looks = [*select_looks(state.rows), {"update": state.update, **figures}]
        if self.config.export == "best" and best_look(looks) is looks[-1]:
            state.keep_best()
        new = [alarm for alarm in find_alarms(self.config, looks) if alarm.update == state.update]
        if self.config.on_alarm != "off":
            for alarm in new:
                self.say(alarm.line(self.config))
        return Look(figures, ends_stage=bool(new) and self.config.on_alarm == "stop")

    @torch.no_grad()
    def measure(self) -> Row:
        """The figures of the student with its present weights."""
        backbone, seeds = self.base.backbone, self.config.seeds
        shape = (len(self.times) - 1, *backbone.latent_shape)
        indices = spread_evenly(len(self.prompts), self.config.prompts)
        total, share = len(indices), distributed.largest_share(len(indices))
        mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        # The last rank may lack some. It draws others again and drops them: sharded networks run on all ranks together.
        indices = (indices[mine] + indices * share)[:share]
        rows: list[Row] = []
        for start in range(0, len(indices), self.at_once):
            drawn = [index for index in indices[start : start + self.at_once] for _ in range(seeds)]
            c = backbone.collate(self.prompts.items(drawn))
            records = self.prompts.records(drawn)
            noises = [noise_for(self.seed, "watch", n, i % seeds, shape=shape) for i, n in enumerate(drawn)]
            noises_SB = torch.stack(noises, dim=1).to(self.times)
            x0 = roll_out(self.base, c, times=self.times, noises=noises_SB, eta=self.eta).x0[-1]
            images = backbone.decode(x0).float()
            scores = score_images(self.reward, images, records)
            parts = zip(images.split(seeds), scores.split(seeds), strict=True)
            rows += [measure_prompt(images_S, scores_S) for images_S, scores_S in parts]
        rows = gather_rows(rows)[:total]
        present = {name: [row[name] for row in rows if name in row] for name in (REWARD, DIVERSITY, SATURATION)}
        means = {name: math.fsum(values) / len(values) for name, values in present.items() if values}
        return {**means, NON_FINITE: math.fsum(row[NON_FINITE] for row in rows) / len(rows)}


def gather_rows(rows: list[Row]) -> list[Row]:
    """The rows of all ranks, rank after rank."""
    if distributed.ranks() == 1:
        return rows
    table = [[row.get(name, math.nan) for name in FIGURES] for row in rows]
    gathered = distributed.all_gather(torch.tensor(table, dtype=torch.float64)).tolist()
    return [
        {name: value for name, value in zip(FIGURES, row, strict=True) if not math.isnan(value)} for row in gathered
    ]


def score_images(reward: Reward, images: torch.Tensor, records: list[PromptRecord]) -> torch.Tensor:
    """The reward (B,) of images (B, 3, H, W); NaN where an image has a value that is not finite."""
    sound = images.isfinite().flatten(1).all(dim=1)
    scores = torch.full((len(images),), math.nan, device=images.device)
    if sound.any():
        known = [record for record, is_sound in zip(records, sound.tolist(), strict=True) if is_sound]
        scores[sound] = reward(images[sound], [record["prompt"] for record in known], known).float()
    return scores


def measure_prompt(images_S: torch.Tensor, scores_S: torch.Tensor) -> Row:
    """The figures of one prompt; an image without a finite score counts as non-finite and for nothing else."""
    sound = scores_S.isfinite()
    row = {NON_FINITE: float((~sound).double().mean())}
    if sound.any():
        row[REWARD] = float(scores_S[sound].double().mean())
        row[SATURATION] = float(saturation(images_S[sound]).mean())
    if sound.sum() > 1:
        row[DIVERSITY] = float(diversity(images_S[sound]))
    return row


def saturation(images: torch.Tensor) -> torch.Tensor:
    """mean over pixels of max(R, G, B) - min(R, G, B): (B, 3, H, W) in [0, 1] -> (B,) in [0, 1], float64."""
    return (images.amax(1) - images.amin(1)).double().mean(dim=(1, 2))


def diversity(images_S: torch.Tensor) -> torch.Tensor:
    """mean over pairs of sqrt(mean (a - b)^2): (S, 3, H, W) in [0, 1], S > 1 -> scalar in [0, 1], float64."""
    flat = images_S.flatten(1).double()
    return torch.pdist(flat).mean() / math.sqrt(flat.shape[1])


def select_looks(rows: list[Row]) -> list[Row]:
    """The metrics rows that hold a look."""
    return [row for row in rows if NON_FINITE in row]


def best_look(looks: list[Row]) -> Row | None:
    """The look with the highest held-out reward, the first of equals. A look with a broken image is never the best."""
    return max((look for look in looks if look[NON_FINITE] == 0), key=lambda look: look[REWARD], default=None)


def find_alarms(watch: Watch, looks: list[Row]) -> list[Alarm]:
    """All alarms of a stage so far, each at the look where its breach began."""
    alarms: list[Alarm] = []
    ongoing: set[str] = set()
    top = None
    for look in looks:
        breached = list(find_breaches(watch, look, looks[0], top))
        alarms += [alarm for alarm in breached if alarm.figure not in ongoing]
        ongoing = {alarm.figure for alarm in breached}
        top = best_look([look] if top is None else [top, look])
    return alarms


def find_breaches(watch: Watch, look: Row, start: Row, top: Row | None) -> Iterator[Alarm]:
    """The breaches at a look. start: the first look of the stage. top: the best look before this one, if any."""

    def against(figure: str, past: Row) -> Alarm:
        return Alarm(figure, int(look["update"]), look[figure], int(past["update"]), past[figure])

    if top is not None and REWARD in look and look[REWARD] < top[REWARD] - watch.reward_drop:
        yield against(REWARD, top)
    both = look.keys() & start.keys()
    if DIVERSITY in both and look[DIVERSITY] < start[DIVERSITY] * (1 - watch.diversity_drop):
        yield against(DIVERSITY, start)
    if SATURATION in both and look[SATURATION] > start[SATURATION] * (1 + watch.saturation_rise):
        yield against(SATURATION, start)
    if look[NON_FINITE] > 0:
        yield against(NON_FINITE, start)


def exported_ema(state: TrainState) -> tuple[dict[str, torch.Tensor], int]:
    """The EMA that a stage writes, watched or not, and its update."""
    if not state.best_ema:
        return state.ema, state.update
    top = best_look(select_looks(state.rows))
    assert top is not None, "an EMA is only kept with its look"
    return state.best_ema, int(top["update"])


def summarize(watch: Watch, state: TrainState) -> dict[str, object]:
    """What the record says of a watched stage that has ended, as JSON."""
    looks = [{key: row[key] for key in row if key in ("update", *FIGURES)} for row in select_looks(state.rows)]
    alarms = find_alarms(watch, looks)
    summary: dict[str, object] = {
        "reward": watch.reward,
        "export": watch.export,
        "exported": exported_ema(state)[1],
        "last": looks[-1],
        "best": best_look(looks),
        "alarms": [asdict(alarm) for alarm in alarms],
    }
    if watch.on_alarm == "stop" and alarms:
        why = "; ".join(alarm.line(watch) for alarm in alarms)
        summary["stopped"] = {"after_update": state.update, "why": why}
    return summary
