"""The remedy: back to a healthy student, with half of what an alarm names.

1. A recovery is a function of rows and checkpoints alone. Killed anywhere, a stage meets the same alarm again and goes
   back to the same checkpoint: it ends with the same bits.
2. The course after it draws the same prompts and noise as the one that was left. At half a rate it is another course,
   and one that was not to blame for the collapse.
3. A reward, diversity, saturation or sharpness that goes wrong is a symptom. It names RL's weight, unless another alarm
   rings with it, whose cause is plainer; that cause stays named until the stage gets further. Where half of RL's weight
   has not helped against a symptom, the student's learning rate is halved too. RL alone has no weight: an optimizer
   that divides by the gradient's size undoes it.
4. A student may be healthy by its figures and lost all the same: whatever the rates, the next look rings. Where two
   recoveries from one student have not helped, the third goes back to the first one of the stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dmdr.config.rl import RL
from dmdr.config.watch import Watch
from dmdr.errors import ConfigError
from dmdr.state import Part, Recovery, Row, StateInfo, TrainState
from dmdr.watch.alarms import list_kept
from dmdr.watch.figures import BLACK, FAKE_LAG, FAKE_RISE, FLAT, GRADIENT, NON_FINITE, WHITE

TRIES = 2  # recoveries from one student before an earlier one is taken
PARTS: tuple[Part, ...] = ("rl", "student", "fake_score")
SETTINGS: dict[Part, str] = {
    "rl": "rl.weight",
    "student": "student.learning_rate",
    "fake_score": "fake_score.learning_rate",
}
HALVES: dict[str, tuple[Part, ...]] = {
    BLACK: ("fake_score",),  # "White or dark" of docs/healthy-run.md
    WHITE: ("fake_score",),
    FLAT: ("student",),
    FAKE_LAG: ("fake_score",),
    FAKE_RISE: ("student",),
    GRADIENT: ("student",),
    NON_FINITE: ("student", "fake_score"),
}  # any other alarm: RL's weight
OF_RL = ("loss_rl", "grad_rl", "rl_", "reward")  # figures of RL in a row of training begin so


@dataclass(frozen=True)
class Saved:
    """A state as a checkpoint has it."""

    tensors: Mapping[str, torch.Tensor]
    info: StateInfo


class Vault(Protocol):
    """Where the checkpoints of looks are kept. All ranks call it."""

    def keep(self, updates: Sequence[int]) -> None:
        """Store the present state if it is of one of these updates, and let go of those of all others."""

    def fetch(self, update: int) -> Saved:
        """The state before an update that is kept.

        Raises:
            DataError: it is not there, or damaged.
        """

    def go_on_from(self, state: TrainState) -> None:
        """Show that the stage went back, and count from there."""


@dataclass(frozen=True)
class Remedy:
    """What a stage does about an alarm.

    stage: its name. rl: None without. has_fake: whether it matches distributions.
    """

    watch: Watch
    stage: str
    rl: RL | None
    has_fake: bool
    vault: Vault

    def plan(self, state: TrainState, looks: Sequence[Row], figures: Sequence[str], why: str) -> Recovery:
        """What is done about figures that rang, or were not numbers. looks: those before, among them the one to go to.

        Raises:
            ConfigError: there is no healthy student to go back to.
        """
        update, kept = state.update, list_kept(self.watch, looks)
        if not kept:
            raise ConfigError(
                f"{self.stage}.watch cannot recover at update {update} ({why}): no look before was healthy, so there "
                "is no checkpoint to go back to; set on_alarm: warn, or begin with a student that draws"
            )
        ends = len(state.recoveries) >= (self.watch.recoveries or 0)
        tried = [recovery.back_to for recovery in state.recoveries[-TRIES:]] == [kept[0]] * TRIES
        back_to = min(kept) if tried and not ends else kept[0]
        halved = [] if ends else self.choose_halved(state, figures, back_to)
        return Recovery(update=update, back_to=back_to, figures=[*figures], why=why, halved=halved, ends=ends)

    def choose_halved(self, state: TrainState, figures: Sequence[str], back_to: int) -> list[Part]:
        """What figures name, each once, as far as the stage has it. back_to: the update that the stage goes back to."""
        acts = self.rl is not None and self.rl.weight > 0 and state.update >= self.rl.start and self.has_fake
        has: dict[Part, bool] = {"rl": acts, "student": True, "fake_score": self.has_fake}
        halved = {figure: list_halved(figure) for figure in figures}
        causes = [parts for parts in halved.values() if parts != ("rl",)]
        last = state.recoveries[-1] if state.recoveries else None
        if not causes and last is not None and last.back_to == back_to and "rl" not in last.halved:
            return last.halved  # it has come no further since
        named = {part if has[part] else "student" for parts in causes or halved.values() for part in parts}
        before = {figure for recovery in state.recoveries for figure in recovery.figures if "rl" in recovery.halved}
        if "rl" in named and before.intersection(figures):
            named.add("student")
        return [part for part in PARTS if part in named]

    def describe(self, state: TrainState, recovery: Recovery) -> str:
        """What it does, as a clause."""
        if recovery.ends:
            return (
                f"it has recovered {len(state.recoveries)} times, goes back to update {recovery.back_to} and ends there"
            )
        number = f"recovery {len(state.recoveries) + 1} of {self.watch.recoveries}"
        halved = " and ".join(f"{self.stage}.{SETTINGS[part]}" for part in recovery.halved)
        return f"goes back to update {recovery.back_to} and halves {halved} ({number})"

    def apply(self, state: TrainState, recovery: Recovery) -> None:
        """Take the state back.

        Raises:
            DataError: the checkpoint to go back to is not there, or damaged.
        """
        made = [*state.recoveries, recovery]
        saved = self.vault.fetch(recovery.back_to)
        state.restore(saved.tensors, saved.info)
        state.recoveries = made
        self.vault.go_on_from(state)


def list_halved(figure: str) -> tuple[Part, ...]:
    """What is to blame for a figure of a look, or of an update, where it is not a number."""
    if figure.startswith("watch/"):
        return HALVES.get(figure, ("rl",))
    return ("rl",) if figure.startswith(OF_RL) else ("student", "fake_score")


def blame(broken: Sequence[str]) -> list[str]:
    """Of the figures of an update that are not numbers, those where it began: losses rather than gradients, and others
    rather than those of RL, which a broken student spoils as well."""
    losses = [figure for figure in broken if figure.startswith("loss_")] or [*broken]
    return [figure for figure in losses if not figure.startswith(OF_RL)] or losses
