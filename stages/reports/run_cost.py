"""What runs have cost: devices, bytes moved, and money where the config of a run has prices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from dmdr.config.stages import STAGES, TRAINING_STAGES
from dmdr.errors import DataError
from stages.live.layout import STATUS, Status
from stages.reports.stage_times import format_effort
from stages.runtime.ledger import CPU, find_spent, read_spent
from stages.store.artifacts import Artifact
from stages.store.layout import LIVE
from stages.store.records import Record, Spent


@dataclass(frozen=True)
class RunCost:
    """What one run, or several, have used. money: by currency. newest: the record of the last sealed stage of a run."""

    spent: Spent = Spent()
    money: Mapping[str, float] = field(default_factory=dict)
    newest: Record | None = None

    def __add__(self, other: RunCost) -> RunCost:
        currencies = {*self.money, *other.money}
        money = {each: self.money.get(each, 0) + other.money.get(each, 0) for each in sorted(currencies)}
        return RunCost(self.spent + other.spent, money)

    def describe(self) -> str:
        """Such as "3.2 GPU-hours, 8.10 EUR, 12.3 GB moved"; empty where nothing was used."""
        moved = self.spent.read_bytes + self.spent.written_bytes
        words = [
            format_spent(self.spent),
            *(format_money(amount, currency) for currency, amount in self.money.items()),
            f"{format_bytes(moved)} moved" if moved else "",
        ]
        return ", ".join(word for word in words if word)


def sum_run(store: str, run: str) -> RunCost:
    """What the stages of a run have used, sealed and open ones.

    Raises:
        DataError: a record is damaged.
    """
    total, newest = RunCost(), None
    for stage in STAGES:
        artifact = Artifact(store, run, stage)
        record = artifact.record()
        if record is not None:
            newest, total = record, total + find_cost(record)
        elif stage in TRAINING_STAGES:
            total += find_open_cost(artifact, read_status(artifact))
    return RunCost(total.spent, total.money, newest)


def find_cost(record: Record) -> RunCost:
    """What a sealed stage has used."""
    cost, is_copy = record.provenance.cost, record.provenance.adopted_from is not None
    money = {} if is_copy or cost.money is None or cost.currency is None else {cost.currency: cost.money}
    return RunCost(find_spent(record), money)


def find_open_cost(artifact: Artifact, status: Status | None) -> RunCost:
    """What an open stage has used, by its checkpoint or its live page, whichever counted longer."""
    spent = read_spent(artifact)
    if status is None or sum(status.spent.device_s.values()) < sum(spent.device_s.values()):
        return RunCost(spent)
    money = {} if status.money is None or status.currency is None else {status.currency: status.money}
    return RunCost(status.spent, money)


def read_status(artifact: Artifact) -> Status | None:
    """What the live page says of a stage."""
    data = artifact.place.read(f"{LIVE}/{STATUS}")
    with suppress(ValueError, DataError):
        return None if data is None else Status.model_validate_json(data)
    return None


def format_spent(spent: Spent) -> str:
    """Such as "3.2 GPU-hours" and "12 CPU-minutes"; empty where nothing was used."""
    seconds: Mapping[str, float] = {
        "cpu": spent.device_s.get(CPU, 0.0),
        "gpu": sum(value for device, value in spent.device_s.items() if device != CPU),
    }
    return ", ".join(format_effort(value, device) for device, value in seconds.items() if value)


def format_money(amount: float, currency: str) -> str:
    """Such as "8.10 EUR", and "0.0021 EUR" of a small run."""
    return f"{amount:,.2f} {currency}" if amount >= 0.1 or not amount else f"{amount:.2g} {currency}"


def format_bytes(count: int) -> str:
    """Such as "12 MB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
