"""What a stage uses: seconds of devices and bytes moved, over all its attempts, and the money that they cost.

1. What an open training stage has used lies beside its checkpoints, and is written with each of them. The time between
   the last checkpoint of a killed attempt and its end is known from the live page, if that got through.
2. A GPU costs from the start of a stage to its end, whether it computes or not. Without a GPU, CPU time counts.
3. A run has used what the records of its sealed stages say and what its open stages have used.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from dmdr.config.plain_text import to_line
from dmdr.config.run import Config
from dmdr.config.stages import STAGES
from dmdr.errors import BudgetSpent, ConfigError
from stages.runtime import ranks
from stages.store.artifacts import Artifact
from stages.store.layout import CHECKPOINTS, SPENT
from stages.store.records import Record, Spent, parse_json
from stages.store.traffic import TRAFFIC

CPU = "cpu"
NAME = f"{CHECKPOINTS}/{SPENT}"


class Ledger:
    """What this attempt of a stage uses, on top of what was used before it.

    began: by the monotonic clock, of a process that does nothing else; None: now, in a process that did other things.
    """

    def __init__(self, began: float | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self._cpu = time.process_time() if began is None else 0.0
        self.before = Spent()

    def measure(self, device: str) -> Spent:
        """What all attempts have used until now. device: the name of the devices that this one uses."""
        count = 1 if ranks.read_rank() is None else int(os.environ["WORLD_SIZE"])
        seconds = time.process_time() - self._cpu if device == CPU else time.monotonic() - self.began
        own = Spent(
            device_s={device: round(seconds * count, 3)}, read_bytes=TRAFFIC.read, written_bytes=TRAFFIC.written
        )
        return self.before + own


def name_unit(config: Config) -> str:
    """The kind of device that is counted: the GPU's name, or cpu."""
    from stages.runtime.device import name_device, pick_device  # late: it imports torch

    return CPU if pick_device(config) == "cpu" else name_device(config)


def count_money(config: Config, spent: Spent) -> float | None:
    """What it costs; None where the config has no price, or not that of a device."""
    return None if config.execution.price is None else config.execution.price.count(spent.device_s)


def read_spent(artifact: Artifact) -> Spent:
    """What the attempts of an open stage have used, as its last checkpoint knew it."""
    data = artifact.place.read(NAME)
    if data is not None:
        with suppress(ValueError):  # damaged: it is a figure, and no reason to stop
            found = parse_json(data)
            if isinstance(found, dict):
                return Spent.from_json(found)
    return Spent()


def write_spent(artifact: Artifact, spent: Spent) -> None:
    """Keep what was used, beside the checkpoints."""
    artifact.place.publish(NAME, lambda file: file.write_bytes(spent.to_json()))


def find_spent(record: Record) -> Spent:
    """What a sealed stage used. An early record tells only of its last attempt."""
    made = record.provenance
    if made.adopted_from is not None:
        return Spent()  # the other run has paid
    if made.cost.spent is not None:
        return made.cost.spent
    count = made.processes or 1
    seconds = made.cost.cpu_s if made.device == CPU else made.duration_s
    return Spent(device_s={CPU if made.device == CPU else "GPU": round(seconds * count, 3)})


def sum_other_stages(artifact: Artifact) -> Spent:
    """What the other stages of a run have used."""
    total = Spent()
    for stage in STAGES:
        if stage != artifact.stage:
            other = Artifact(artifact.store, artifact.run, stage)
            record = other.record()
            total += read_spent(other) if record is None else find_spent(record)
    return total


class Budget:
    """The money that a run may cost, and what its other stages have cost."""

    def __init__(self, config: Config, artifact: Artifact) -> None:
        self.config, self.limit = config, config.execution.budget
        self._others = Spent() if self.limit is None else sum_other_stages(artifact)

    def check_price(self, device: str) -> None:
        """
        Raises:
            ConfigError: there is a budget, and the device that this stage runs on has no price.
        """
        price = self.config.execution.price
        if self.limit is not None and price is not None and price.find(device) is None:
            raise ConfigError(
                f"execution.budget is {self.limit:g}, but execution.price.hour has no price of {to_line(device)}; "
                f"add one to {', '.join(price.hour)}"
            )

    def count(self, spent: Spent) -> float:
        """What the run costs. spent: by this stage. Stages on devices that have no price count for nothing."""
        price, total = self.config.execution.price, self._others + spent
        priced = {device: total.device_s[device] for device in total.device_s if price and price.find(device)}
        return price.count(priced) or 0.0 if price else 0.0

    def is_spent(self, spent: Spent) -> bool:
        """Whether the run has cost as much as it may."""
        return self.limit is not None and self.count(spent) >= self.limit

    def build_error(self, spent: Spent, place: str) -> BudgetSpent:
        """place: how far the stage is, for the message."""
        price = self.config.execution.price
        assert price is not None and self.limit is not None, "the config refuses a budget without prices"
        return BudgetSpent(
            f"stopped {place}: the run has cost {self.count(spent):.2f} {price.currency} and execution.budget is "
            f"{self.limit:g}; what is done is kept: raise execution.budget and repeat the command to go on"
        )
