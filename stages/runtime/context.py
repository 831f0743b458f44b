"""The context of a stage: its config, artifact, folders and progress. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmdr.config.run import Config
    from stages.runtime.ledger import Ledger
    from stages.runtime.progress import Progress
    from stages.store.artifacts import Artifact


def begin_ledger() -> Ledger:
    """The ledger of a stage that begins now."""
    from stages.runtime.ledger import Ledger

    return Ledger()


@dataclass(frozen=True)
class Context:
    """The argument of a stage's `run`."""

    config: Config
    artifact: Artifact  # of this stage; __main__ seals it
    out: Path  # fresh and empty: the stage writes its files here
    cache: Path  # for inputs that have to be downloaded
    progress: Progress
    stop: Callable[[], bool]  # whether the stage has to checkpoint and raise Stopped
    ledger: Ledger = field(default_factory=begin_ledger)  # what the stage uses, for its record
    _inputs: dict[tuple[str, str], Path] = field(default_factory=dict, init=False, repr=False)

    def input(self, stage: str, under: str = "") -> Path:
        """The folder of another stage's sealed artifact, verified once. Never write there.

        under: fetch and verify only the files whose names begin with it.

        Raises:
            InputMissing: that stage is not sealed.
            DataError: one of its files is damaged.
        """
        from stages.store.artifacts import Artifact

        if (stage, under) not in self._inputs:
            artifact = Artifact(self.artifact.store, self.artifact.run, stage)
            self._inputs[stage, under] = artifact.fetch(self.cache / stage, lambda name: name.startswith(under))
        return self._inputs[stage, under]
