"""Remove a run, or a stage of a run and what was made from it. Whoever asks is told first what depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dmdr.config.stages import STAGES, TABLE, StageName
from dmdr.errors import ConfigError, InputMissing
from stages.store.address import open_place
from stages.store.artifacts import Artifact
from stages.store.layout import EVENTS
from stages.store.records import Record
from stages.store.runs import is_run, list_promoted, list_runs


@dataclass(frozen=True)
class Removal:
    """What will be removed.

    stages: in data order, as far as something of them is there. size: bytes that their records count.
    promoted: names that point at this export. adopted: runs that have a copy of one of these stages, and keep it.
    """

    store: str
    run: str
    stages: tuple[StageName, ...]
    size: int
    promoted: tuple[str, ...]
    adopted: tuple[str, ...]


def plan_removal(store: str, run: str, stage: StageName | None) -> Removal:
    """Find what has to go. stage: with it go the later stages that were made from it; None: the whole run.

    Raises:
        InputMissing: nothing of it is there.
        ConfigError: a process of this machine works on it, or files lie there that DMDR did not write.
    """
    artifacts = {name: Artifact(store, run, name) for name in STAGES}
    for artifact in artifacts.values():
        artifact.refuse_foreign_files()
    found = {name: artifact.record() for name, artifact in artifacts.items() if artifact.place.names()}
    asked = set(STAGES) if stage is None else _list_made_from(stage, found)
    stages = tuple(name for name in STAGES if name in asked and name in found)
    if not stages:
        raise InputMissing(f"nothing of {stage or 'a stage'} is at {artifacts[stage or STAGES[0]].address}")
    for name in stages:
        artifacts[name].place.tidy()
        if artifacts[name].place.is_busy():
            raise ConfigError(f"{name} of run {run} is running; stop it first, with Ctrl-C where it was started")
    records = {name: record for name in stages if (record := found[name]) is not None}
    promoted = [name for name, pointer in list_promoted(store).items() if pointer.run == run]
    return Removal(
        store=store,
        run=run,
        stages=stages,
        size=sum(file.size for record in records.values() for file in record.files.values()),
        promoted=tuple(promoted) if "export" in stages else (),
        adopted=tuple(_list_copies(store, run, stages)),
    )


def remove(removal: Removal) -> None:
    """Remove it, the last stage first. Whatever else lies in the run's folder stays there."""
    for stage in reversed(removal.stages):
        Artifact(removal.store, removal.run, stage).delete()
    if not is_run(removal.store, removal.run):
        open_place(f"{removal.store.rstrip('/')}/{removal.run}").remove(EVENTS)
    open_place(removal.store).remove_empty(removal.run)


def _list_made_from(stage: StageName, found: Mapping[StageName, Record | None]) -> set[StageName]:
    """The stage and those that were made from it, directly or not. found: their records; None for an open stage."""
    made = {stage}
    for name, record in found.items():
        reads = TABLE[name].reads if record is None else record.inputs.keys()
        if not made.isdisjoint(reads):
            made.add(name)
    return made


def _list_copies(store: str, run: str, stages: tuple[StageName, ...]) -> list[str]:
    """The other runs that adopted one of these stages."""
    return [
        other
        for other in list_runs(store)
        if other != run
        and any(
            (record := Artifact(store, other, stage).record()) is not None and record.provenance.adopted_from == run
            for stage in stages
        )
    ]
