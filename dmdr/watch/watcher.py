"""Looks at a student while it trains: draws images with its EMA, and measures them in ways that nothing trains on.

1. Prompts and noise are the same at every look, so its figures differ by the weights alone. Evaluation prompts stay
   out: they decide later, and to decide twice by the same prompts would flatter the student.
2. A look at update u sees the EMA after u updates and stands in the metrics row of update u. The end of the stage is
   always looked at and gets a row of its own.
3. The first look of a cold start draws with the teacher too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dmdr import distributed
from dmdr.backbones.protocol import Conditioning
from dmdr.config.rl import RL
from dmdr.config.watch import Watch
from dmdr.noise import noise_for
from dmdr.promptset import spread_evenly
from dmdr.promptset.prompts import Prompts
from dmdr.rewards.protocol import Reward
from dmdr.shared_base import SharedBase
from dmdr.state import Recovery, Row, TrainState
from dmdr.update import roll_out
from dmdr.watch.alarms import Alarm, best_look, find_alarms, list_kept
from dmdr.watch.figures import (
    average_rows,
    gather_rows,
    measure_prompt,
    measure_updates,
    name_of_teacher,
    score_images,
    select_looks,
)
from dmdr.watch.recovery import Remedy, Vault, blame

Draw = Callable[[Conditioning, torch.Tensor], torch.Tensor]  # prompts, noises (N, B, C, H, W) -> x0 (B, C, H, W)


@dataclass(frozen=True)
class Look:
    """What one look found: figures for the metrics row, empty when no look was due; what is done about an alarm.

    ends_stage: whether an alarm ends the stage here.
    """

    figures: Row = field(default_factory=dict)
    ends_stage: bool = False
    recovery: Recovery | None = None


@dataclass(frozen=True)
class Watcher:
    """Looks at the EMA every `config.every` updates and reports alarms.

    reward: one that is not trained on; None without. prompts: of training; `config.prompts` of them are drawn, evenly
    spread. times: (N + 1,) of the student, on its device. eta: of the finished student. at_once: prompts that are drawn
    together. updates: of the stage. say: takes an alarm's line. rl, has_fake: as `Remedy`. draw_teacher: for a stage
    whose student begins as no good one. vault: needed where checkpoints are kept.
    """

    config: Watch
    base: SharedBase
    reward: Reward | None
    prompts: Prompts
    times: torch.Tensor
    eta: float
    seed: int
    at_once: int
    updates: int
    say: Callable[[str], None]
    stage: str = "joint"
    rl: RL | None = None
    has_fake: bool = True
    draw_teacher: Draw | None = None
    vault: Vault | None = None

    @property
    def remedy(self) -> Remedy:
        assert self.vault is not None, "checkpoints are kept somewhere"
        return Remedy(self.config, self.stage, self.rl, self.has_fake, self.vault)

    @property
    def recovers_divergence(self) -> bool:
        return self.config.on_divergence == "recover"

    def is_due(self, update: int) -> bool:
        """Whether the student is looked at before this update."""
        return update % self.config.every == 0 or update == self.updates

    def look(self, state: TrainState, *, last: bool) -> Look:
        """Measure the EMA if that is due or this is the `last` look; keep it where the config says so.

        Raises:
            ConfigError: the config asks for a recovery, and there is nothing to go back to.
        """
        if not last and state.update % self.config.every:
            return Look()
        before = select_looks(state.rows)
        figures = self.measure_look(state, is_first=not before)
        looks = [*before, {"update": state.update, **figures}]
        new = [alarm for alarm in find_alarms(self.config, looks) if alarm.update == state.update]
        if new and self.config.on_alarm == "recover" and not state.has_ended:
            return Look(figures, recovery=self.plan_recovery(state, before, new))
        if self.config.export == "best" and best_look(looks) is looks[-1]:
            state.keep_best()
        if self.config.kept and state.update in (kept := list_kept(self.config, looks)):
            assert self.vault is not None, "checkpoints are kept somewhere"
            self.vault.keep(kept)
        if self.config.on_alarm != "off":
            for alarm in new:
                self.say(alarm.line(self.config, self.stage, has_rl=self.rl is not None))
        return Look(figures, ends_stage=bool(new) and self.config.on_alarm == "stop")

    def plan_recovery(self, state: TrainState, before: Sequence[Row], alarms: Sequence[Alarm]) -> Recovery:
        """What is done about alarms, which is said in one line. Raises as `Remedy.plan`."""
        why = "; ".join(alarm.describe(self.config) for alarm in alarms)
        recovery = self.remedy.plan(state, before, [alarm.figure for alarm in alarms], why)
        self.say(f"ALARM at update {state.update}: {why}; {self.remedy.describe(state, recovery)}")
        return recovery

    def plan_divergence(self, state: TrainState, look: Look, broken: Row) -> Recovery:
        """The same about figures of an update that are not numbers. look: the one before the update, if it was due."""
        present = [{"update": state.update, **look.figures}] if look.figures else []
        figures = blame([*broken])
        why = " and ".join(f"{figure} is {broken[figure]}" for figure in figures)
        recovery = self.remedy.plan(state, [*select_looks(state.rows), *present], figures, why)
        self.say(f"ALARM at update {state.update}: {why}; {self.remedy.describe(state, recovery)}")
        return recovery

    def measure_look(self, state: TrainState, *, is_first: bool) -> Row:
        """The figures of a look. is_first: whether the stage has none before it."""
        with state.averaged():
            figures = self.measure()
        figures |= measure_updates(state.rows, self.config.every)
        if is_first and self.draw_teacher is not None:
            of_teacher = self.measure(self.draw_teacher)
            figures |= {name_of_teacher(name): value for name, value in of_teacher.items()}
        return figures

    @torch.no_grad()
    def measure(self, draw: Draw | None = None) -> Row:
        """The figures of the student with its present weights, or of what `draw` draws."""
        backbone, seeds, draw = self.base.backbone, self.config.seeds, draw or self.draw_student
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
            noises = [noise_for(self.seed, "watch", n, i % seeds, shape=shape) for i, n in enumerate(drawn)]
            images = backbone.decode(draw(c, torch.stack(noises, dim=1).to(self.times))).float()
            records = self.prompts.records(drawn)
            scores = None if self.reward is None else score_images(self.reward, images, records)
            of_prompts = [None] * (len(drawn) // seeds) if scores is None else scores.split(seeds)
            rows += [measure_prompt(images_S, of) for images_S, of in zip(images.split(seeds), of_prompts, strict=True)]
        return average_rows(gather_rows(rows)[:total])

    def draw_student(self, c: Conditioning, noises: torch.Tensor) -> torch.Tensor:
        return roll_out(self.base, c, times=self.times, noises=noises, eta=self.eta).x0[-1]
