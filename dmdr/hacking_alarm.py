"""The hacking alarm: what the EMA draws for training prompts, by figures that nothing is trained on.

1. Neither the paper nor the official demo watches anything; all of this is ours.
2. Prompts and noise are the same at every look, so that its figures differ by the weights alone. Evaluation prompts are
   never drawn: they decide later, and deciding twice by the same prompts would flatter the student.
3. A look at update u sees the EMA after u updates, and stands in the metrics row of update u. The end of the stage is
   always looked at; it gets a row of its own.
4. An alarm is raised when its breach begins, and again only after the breach has ended in between.
5. All alarms follow from the rows, so that a resumed run needs no memory of its own.

P prompts, S images of each, B images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from dmdr import distributed
from dmdr.config.run import Watch
from dmdr.promptset import PromptSet
from dmdr.rewards.load import load_reward
from dmdr.rewards.protocol import Reward
from dmdr.rollout import noise_for
from dmdr.shared_base import SharedBase
from dmdr.state import TrainState
from dmdr.update import roll_out

Row = dict[str, float]  # {"update": u, "watch/reward": ...}; a figure without a sound image to tell it is left out
FIGURES = REWARD, DIVERSITY, SATURATION, NON_FINITE = (
    "watch/reward",
    "watch/diversity",
    "watch/saturation",
    "watch/non_finite",
)


@dataclass(frozen=True)
class Alarm:
    """A figure that went too far: what it is now, at `update`, and what it was at `since`."""

    figure: str
    update: int
    now: float
    since: int
    was: float

    def line(self, watch: Watch) -> str:
        """What is watched, now, before, and what to do."""
        now, gentler = f"{self.now:.4g}", "lower joint.rl.weight or joint.student.learning_rate"
        before = f"it was {self.was:.4g} at update {self.since}"
        kept = "its EMA is kept" if watch.export == "best" else "joint.watch.export: best would keep its EMA"
        told = {
            REWARD: f"the held-out reward {watch.reward} is {now}, {before}, its best ({kept}); {gentler}, or train on "
            "more rewards",
            DIVERSITY: f"the difference between images of one prompt is {now}, {before}: they become alike; {gentler}",
            SATURATION: f"colour saturation is {now}, {before}: a reward may be hacked by colour; {gentler}",
            NON_FINITE: f"the share of images that are not numbers is {now}, {before}; {gentler}",
        }
        return f"ALARM at update {self.update}: {told[self.figure]}"


@dataclass(frozen=True)
class Seen:
    """A look: the figures for the metrics row, empty when none was due, and whether training has to end here."""

    figures: Row
    stop: bool


class Watcher:
    """Looks at the EMA every `config.every` updates; the alarms go to `say`, one line each.

    Args:
        prompts: the training prompts; `config.prompts` of them are drawn, evenly spread.
        times: (N + 1,) of the student, on its device.
        batch_size: images that are drawn at once, at least one prompt's.
        weights: where those of the reward lie, if not at their pinned addresses.

    Raises:
        ConfigError: there is no reward of that name.
    """

    def __init__(
        self,
        config: Watch,
        base: SharedBase,
        *,
        prompts: PromptSet,
        times: torch.Tensor,
        seed: int,
        batch_size: int,
        say: Callable[[str], None],
        weights: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.base, self.prompts, self.times, self.seed = config, base, prompts, times, seed
        self.reward = load_reward(config.reward, str(base.backbone.network.device), weights)
        self.at_once, self.say = max(1, batch_size // config.seeds), say

    def look(self, state: TrainState, *, last: bool) -> Seen:
        """Measure the EMA if that is due, or if this is the `last` look; keep it if it is the best and is wanted."""
        if not last and state.update % self.config.every:
            return Seen({}, stop=False)
        with state.averaged():
            figures = self.measure()
        looks = [*select_looks(state.rows), {"update": state.update, **figures}]
        if self.config.export == "best" and best_look(looks) is looks[-1]:
            state.keep_best()
        new = [alarm for alarm in find_alarms(self.config, looks) if alarm.update == state.update]
        if self.config.on_alarm != "off":
            for alarm in new:
                self.say(alarm.line(self.config))
        return Seen(figures, stop=bool(new) and self.config.on_alarm == "stop")

    @torch.no_grad()
    def measure(self) -> Row:
        """The figures of the student as it is."""
        backbone, seeds = self.base.backbone, self.config.seeds
        shape = (len(self.times) - 1, *backbone.latent_shape)
        indices = self.prompts.spread(self.config.prompts)
        total, each = len(indices), -(-len(indices) // distributed.ranks())
        mine = slice(distributed.rank() * each, (distributed.rank() + 1) * each)
        # the last rank may lack some: it draws others again and drops them, because networks may run on all ranks only
        indices = (indices[mine] + indices * each)[:each]
        found: list[Row] = []
        for start in range(0, len(indices), self.at_once):
            drawn = [index for index in indices[start : start + self.at_once] for _ in range(seeds)]
            c = backbone.collate(self.prompts.items(drawn))
            texts = [record["prompt"] for record in self.prompts.records(drawn)]
            noises = [noise_for(self.seed, "watch", n, i % seeds, shape=shape) for i, n in enumerate(drawn)]
            x0 = roll_out(self.base, c, self.times, torch.stack(noises, dim=1).to(self.times)).x0[-1]
            images = backbone.decode(x0).float()
            scores = score_images(self.reward, images, texts)
            parts = zip(images.split(seeds), scores.split(seeds), strict=True)
            found += [measure_prompt(images_S, scores_S) for images_S, scores_S in parts]
        found = gather_rows(found)[:total]
        present = {name: [row[name] for row in found if name in row] for name in (REWARD, DIVERSITY, SATURATION)}
        means = {name: math.fsum(values) / len(values) for name, values in present.items() if values}
        return {**means, NON_FINITE: math.fsum(row[NON_FINITE] for row in found) / len(found)}


def gather_rows(rows: list[Row]) -> list[Row]:
    """The rows of all ranks, one rank's after another's."""
    if distributed.ranks() == 1:
        return rows
    table = [[row.get(name, math.nan) for name in FIGURES] for row in rows]
    every = distributed.all_gather(torch.tensor(table, dtype=torch.float64)).tolist()
    return [{name: value for name, value in zip(FIGURES, row, strict=True) if not math.isnan(value)} for row in every]


def score_images(reward: Reward, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The reward (B,) of images (B, 3, H, W); NaN, without asking it, where a value of the image is not finite."""
    sound = images.isfinite().flatten(1).all(dim=1)
    scores = torch.full((len(images),), math.nan, device=images.device)
    if sound.any():
        texts = [prompt for prompt, is_sound in zip(prompts, sound.tolist(), strict=True) if is_sound]
        scores[sound] = reward(images[sound], texts).float()
    return scores


def measure_prompt(images_S: torch.Tensor, scores_S: torch.Tensor) -> Row:
    """The figures of one prompt; what has no finite score counts as non-finite and for nothing else."""
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
    """The look with the highest held-out reward, the first of equals; one that saw a broken image is never the best."""
    return max((look for look in looks if look[NON_FINITE] == 0), key=lambda look: look[REWARD], default=None)


def find_alarms(watch: Watch, looks: list[Row]) -> list[Alarm]:
    """All alarms of a stage so far, each at the look at which its breach began."""
    found: list[Alarm] = []
    ongoing: set[str] = set()
    top = None
    for look in looks:
        breached = list(find_breaches(watch, look, looks[0], top))
        found += [alarm for alarm in breached if alarm.figure not in ongoing]
        ongoing = {alarm.figure for alarm in breached}
        top = best_look([look] if top is None else [top, look])
    return found


def find_breaches(watch: Watch, look: Row, start: Row, top: Row | None) -> Iterator[Alarm]:
    """What is wrong at a look. start: the first look of the stage; top: the best of those before, None without one."""

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
    """The EMA that a stage writes, watched or not, and the update that it is of."""
    if not state.best_ema:
        return state.ema, state.update
    top = best_look(select_looks(state.rows))
    assert top is not None, "an EMA is only kept with its look"
    return state.best_ema, int(top["update"])


def summarize(watch: Watch, state: TrainState) -> dict:
    """What the record says of a watched stage that has ended."""
    looks = [{key: row[key] for key in row if key in ("update", *FIGURES)} for row in select_looks(state.rows)]
    raised, top = find_alarms(watch, looks), best_look(looks)
    told = {"reward": watch.reward, "export": watch.export, "exported": exported_ema(state)[1]}
    told |= {"last": looks[-1], "best": top, "alarms": [asdict(alarm) for alarm in raised]}
    if watch.on_alarm == "stop" and raised:
        why = "; ".join(alarm.line(watch) for alarm in raised)
        told["stopped"] = {"after_update": state.update, "why": why}
    return told
