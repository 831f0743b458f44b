"""All that a resume needs, as tensors and JSON: both networks, both optimizers, the EMA, the update and the metrics.

There is no random state: noise, prompts and order are functions of (seed, stage, update).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Literal, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from dmdr import distributed
from dmdr.config.training import Optimizer, Training
from dmdr.errors import DataError
from dmdr.optimizers import Balance, Trainable, build_optimizer, read_state, restore_state
from dmdr.shared_base import SharedBase

Tensors = dict[str, torch.Tensor]
Row = dict[str, float]  # {"update": u, figure: value, ...}
NOTHING: Mapping[str, Trainable] = MappingProxyType({})
Part = Literal["rl", "student", "fake_score"]  # what a recovery slows down: RL's weight, or a learning rate


class Recovery(BaseModel):
    """A stage that went wrong at `update` went back to the state before update `back_to`.

    figures: that rang, or were not numbers. why: the same in words. halved: what has half of its value from then on.
    ends: the stage may recover no more, and ends there.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    update: int
    back_to: int
    figures: list[str]
    why: str
    halved: list[Part]
    ends: bool = False


class StateInfo(TypedDict):
    """The part of a checkpoint that is JSON."""

    update: int
    warmup: int
    rl_weight: float
    rl_ratios: list[float]
    rl_lengths: list[float]
    rows: list[Row]
    recoveries: list[dict[str, object]]


class _SavedInfo(BaseModel):
    """StateInfo as a checkpoint gives it back, its types checked."""

    model_config = ConfigDict(strict=True)

    update: int
    warmup: int = 0  # which early checkpoints lack
    rl_weight: float
    rl_ratios: list[float] = []  # which early checkpoints lack, and so do the lengths
    rl_lengths: list[float] = []
    rows: list[Row]
    recoveries: list[Recovery] = []  # which early checkpoints lack


def check_info(step: int, info: Mapping[str, object], *, updates: int, warmup: int = 0) -> None:
    """Check that the info of a checkpoint can be that of a state after `step` of so many updates, those of the fake
    score's warm-up counted first.

    Raises:
        ValueError: in one line.
    """
    try:
        found = _SavedInfo.model_validate(info)
    except ValidationError as error:
        raise ValueError("its state.json is not that of a training stage") from error
    if found.warmup + found.update != step or len(found.rows) != step:
        raise ValueError(f"its state.json is of update {found.update} with {len(found.rows)} rows of metrics")
    if not 0 <= found.update <= updates:
        raise ValueError(f"the stage has {updates} updates")
    if not 0 <= found.warmup <= warmup or (found.update and found.warmup < warmup):
        raise ValueError(f"the stage has {warmup} updates of the fake score alone before the first of the student")


class TrainState:
    """What changes while training.

    update: student updates done. warmup: updates of the fake score alone, before them. rows: one metrics row for each
    of both, and one more at the end of a watched stage.
    balance: of RL's gradient beside distribution matching's. rl_weight: its weight at the last update.
    best_ema: empty unless the watch keeps it. beside: what RL trains of its own, by role.
    recoveries: how often the watch has gone back so far. Rows hold the course that goes on, not those that were left.
    """

    def __init__(
        self, base: SharedBase, training: Training, *, ema: float, beside: Mapping[str, Trainable] = NOTHING
    ) -> None:
        self.update, self.warmup, self.rl_weight, self.ema_decay = 0, 0, 0.0, ema
        self.rows: list[Row] = []
        self.recoveries: list[Recovery] = []
        self.balance = Balance()
        if training.rl is not None:
            self.balance = Balance(training.rl.weight, training.rl.matching)
        self.student = _build_trainable(base.student_parameters, training.student)
        self.fake_score = _build_trainable(base.fake_parameters, training.fake_score)
        self.trainables = {"student": self.student, "fake_score": self.fake_score, **beside}
        self.kinds: dict[str, str] = {"student": training.student.kind, "fake_score": training.fake_score.kind}
        self.ema: Tensors = {name: parameter.detach().clone() for name, parameter in base.student_parameters.items()}
        self.best_ema: Tensors = {}

    @property
    def step(self) -> int:
        """Updates done, those of the warm-up included."""
        return self.warmup + self.update

    @property
    def last_row(self) -> Row:
        """The metrics row of the last update; the row that a watched stage adds at its end is none."""
        return self.rows[self.step - 1]

    @property
    def has_ended(self) -> bool:
        """Whether the last recovery ends the stage where it is."""
        return bool(self.recoveries) and self.recoveries[-1].ends

    def slow_down(self, part: Part) -> float:
        """What the RL weight or a learning rate is multiplied by: a half for each recovery that halved it."""
        return 0.5 ** sum(part in recovery.halved for recovery in self.recoveries)

    @torch.no_grad()
    def advance(self, row: Row) -> None:
        """Count one finished student update: ema <- d ema + (1 - d) student.

        d = (1 - 1 / u)^3 at the u-th update, up to the configured decay: the power function average of EDM2 (Karras et
        al. 2024, section 3.1, gamma 2). It averages over the same share of a short stage as of a long one, and soon
        forgets the start.
        """
        self.update += 1
        decay = min(self.ema_decay, (1 - 1 / self.update) ** 3)
        student = [distributed.local_shard(self.student.parameters[name]) for name in self.ema]
        torch._foreach_lerp_([distributed.local_shard(average) for average in self.ema.values()], student, 1 - decay)
        self.rows.append(row)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student has the values of its EMA. Both have their own again afterwards, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.ema.items():
            student = distributed.local_shard(self.student.parameters[name])
            ema = distributed.local_shard(average)
            previous = student.clone()
            student.copy_(ema)
            ema.copy_(previous)

    def keep_best(self) -> None:
        """Remember the EMA as it is now."""
        if not self.best_ema:
            self.best_ema = {name: torch.empty_like(average) for name, average in self.ema.items()}
        for name, average in self.ema.items():
            distributed.local_shard(self.best_ema[name]).copy_(distributed.local_shard(average))

    def tensors(self) -> Tensors:
        """Everything as one flat dict: role/param/name, role/exp_avg/name, ..., ema/name, best_ema/name.

        A sharded tensor gives this rank's rows; any other comes from the first rank only.
        """
        flat = {f"ema/{name}": value for name, value in self.ema.items()}
        flat |= {f"best_ema/{name}": value for name, value in self.best_ema.items()}
        for role, trainable in self.trainables.items():
            for name, parameter in trainable.parameters.items():
                flat[f"{role}/param/{name}"] = parameter.detach()
                for key, value in read_state(trainable.optimizer, parameter).items():
                    flat[f"{role}/{key}/{name}"] = value
        return {name: distributed.local_shard(value) for name, value in flat.items() if distributed.has_rows(value)}

    def info(self) -> StateInfo:
        """The numbers that are no tensors, as they are now: later updates do not change what this returns."""
        return {
            "update": self.update,
            "warmup": self.warmup,
            "rl_weight": self.rl_weight,
            "rl_ratios": [*self.balance.ratios],
            "rl_lengths": [*self.balance.lengths],
            "rows": [*self.rows],
            "recoveries": [recovery.model_dump() for recovery in self.recoveries],
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], info: StateInfo) -> None:
        """Take over a saved state, whatever this one was; the next update continues from it.

        Raises:
            DataError: the tensors are of another model.
        """
        self.update, self.rl_weight, self.rows = info["update"], info["rl_weight"], list(info["rows"])
        self.warmup = info.get("warmup", 0)  # which early checkpoints lack, as the next two
        self.balance.ratios, self.balance.lengths = list(info.get("rl_ratios", ())), list(info.get("rl_lengths", ()))
        self.recoveries = [Recovery.model_validate(each) for each in info.get("recoveries", ())]
        fill_parameters(self.ema, TensorsBelow("ema/", tensors), "checkpoint's EMA")
        self.best_ema = {}
        if best := TensorsBelow("best_ema/", tensors):
            self.keep_best()
            fill_parameters(self.best_ema, best, "checkpoint's best EMA")
        for role, trainable in self.trainables.items():
            fill_parameters(trainable.parameters, TensorsBelow(f"{role}/param/", tensors), f"checkpoint's {role}")
            keys = {name.split("/", 2)[1] for name in tensors if name.startswith(f"{role}/")} - {"param"}
            trainable.optimizer.state.clear()  # a state before the first step has none
            for name, parameter in trainable.parameters.items():
                names = {key: f"{role}/{key}/{name}" for key in sorted(keys)}
                saved = {key: tensors[full] for key, full in names.items() if full in tensors}
                if saved:
                    restore_state(trainable.optimizer, parameter, saved, self.kinds.get(role, "adamw"))


def _build_trainable(parameters: dict[str, torch.nn.Parameter], config: Optimizer) -> Trainable:
    return Trainable(parameters, build_optimizer(parameters, config), config.clip)


class TensorsBelow(Mapping[str, torch.Tensor]):
    """The tensors whose names begin with `prefix`, by the rest of their names."""

    def __init__(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.prefix, self.tensors = prefix, tensors
        self.names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def fill_parameters(parameters: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], what: str) -> None:
    """Copy whole tensors into parameters of the same names and shapes; of a sharded one this rank takes its rows.

    Raises:
        DataError: a name or a shape differs; `what` names the source.
    """
    missing, unknown = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
    if missing or unknown:
        difference = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
        raise DataError(
            f"{what} does not fit this model: {difference}; was it made with another teacher, form or rank?"
        )
    for name, parameter in parameters.items():
        tensor = saved[name]
        if parameter.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, the model has {tuple(parameter.shape)}"
            raise DataError(f"{what} does not fit this model: {name} is {shapes}; another teacher, form or rank?")
        distributed.copy_shard(parameter, tensor)
